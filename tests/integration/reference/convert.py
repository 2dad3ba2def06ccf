"""Random weights for a configuration of transformers, and the pinned tree's own converter to make a GGUF file of them.

The converter runs unmodified in a process of its own, since it brings its own gguf package. Only the vocabulary step is
left out: it looks tokenizers up by a hash of published ones, and the comparison goes from token ids to logits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.integration.reference.architectures import Case

TREE = Path(__file__).resolve().parents[3] / "build" / "native" / "llama.cpp"


def make_model(case: Case) -> Any:
    """The case's model in float32 with random weights: reproducible, and lively enough that every part counts."""
    import torch
    import transformers

    cls = getattr(transformers, case.hf)
    torch.manual_seed(case.seed)
    config = cls.config_class(**case.config)
    model = cls._from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, values in (*model.named_parameters(), *model.named_buffers()):
            _randomise(case, model, name, values)
    return model.eval()


def _randomise(case: Case, model: Any, name: str, values: Any) -> None:
    """Fill one tensor, in place."""
    import torch

    last = name.rsplit(".", 1)[-1]
    owner = type(model.get_submodule(name.rsplit(".", 1)[0])).__name__ if "." in name else ""
    if "inv_freq" in last or last in ("embed_scale", "layer_scalar"):
        return
    noise = torch.randn(values.shape)
    if values.ndim < 2:
        values.add_(0.2 * noise)  # on top of the initial ones (norms) or zeros (biases)
    elif "embed" in name:
        values.copy_(noise)
    elif owner == case.router or ".gate." in name or ".router." in name:
        values.copy_(case.spread * noise / values.shape[-1] ** 0.5)
    else:
        values.copy_(noise / values.shape[-1] ** 0.5)


def save(case: Case, model: Any, folder: Path) -> None:
    """The folder that a published checkpoint would be, as far as the converter reads it."""
    model.save_pretrained(folder)
    # gemma's converter counts the tokens, to cut off the rows of the embedding that have none
    vocabulary = {str(token): token for token in range(case.config["vocab_size"])}
    tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    if case.published:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | case.published
        path.write_text(json.dumps(config), encoding="utf-8")


def convert(jobs: Sequence[tuple[Case, Path, Path]]) -> None:
    """Convert Hugging Face folders to F32 GGUF files, (case, folder, file) each, in one process."""
    script = TREE / "convert_hf_to_gguf.py"
    if not script.exists():
        raise FileNotFoundError(f"{script.name} is not in the build tree: make build")
    commands = [[str(folder), "--outfile", str(file), "--outtype", "f32", *case.options] for case, folder, file in jobs]
    command = [sys.executable, __file__, json.dumps(commands)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def main() -> None:
    """Run the converter with each list of arguments of the JSON list on the command line."""
    sys.path.insert(0, str(TREE))
    import convert_hf_to_gguf as converter  # type: ignore[import-not-found]

    def set_vocab(self: Any) -> None:
        self._set_vocab_none()
        key = f"{self.gguf_writer.arch}.vocab_size"
        if not any(key in shard for shard in self.gguf_writer.kv_data):
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    classes = converter.get_model_class

    def get_model_class(*args: Any, **kwargs: Any) -> Any:
        model_class = classes(*args, **kwargs)
        model_class.set_vocab = set_vocab
        return model_class

    converter.get_model_class = get_model_class
    for command in json.loads(sys.argv[1]):
        sys.argv = [str(TREE / "convert_hf_to_gguf.py"), *command]
        converter.main()


if __name__ == "__main__":
    main()
