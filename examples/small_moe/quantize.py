"""Choose a quantization by measurement: `python -m small_moe.quantize F32.gguf CORPUS.jsonl FOLDER --tools BIN`.

Rule: of the mixtures below that give at most 20,000,000 bytes, the one whose next-token distribution is nearest to
that of the F32 file on held-out text (mean KL), by llama.cpp's own programs. Rows shorter than 256 (the experts' down
matrices) have no Q6_K and stay Q8_0. FOLDER gets small.gguf and quantization.json, in which the chosen file is also
measured on the test part.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .sources import lines

MOST_BYTES = 20_000_000
TRIES = 8  # of a measurement: llama-perplexity may end before the last lines of its log are written
# type of the file, and tensors of another type
MIXTURES: dict[str, tuple[str, dict[str, str]]] = {
    "Q8_0": ("Q8_0", {}),
    "Q8_0, embedding Q6_K": ("Q8_0", {"token_embd": "q6_K"}),
    "Q8_0, head Q6_K": ("Q8_0", {"^output.weight": "q6_K"}),
    "Q8_0, attention Q6_K": ("Q8_0", {"attn_(q|k|v|output)": "q6_K"}),
    "Q8_0, gates Q6_K": ("Q8_0", {"ffn_gate_exps": "q6_K"}),
    "Q6_K": ("Q6_K", {"ffn_down_exps": "q8_0"}),
    "Q5_K": ("Q5_K_S", {"ffn_down_exps": "q8_0"}),
}
_MEASURED = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "perplexity_f32": r"Mean PPL\(base\)\s*:\s*([\d.]+)",
    "kl": r"Mean\s+KLD\s*:\s*(-?[\d.]+)",
    "kl_error": r"Mean\s+KLD\s*:\s*-?[\d.]+\s*±\s*([\d.]+)",
    "same_top": r"Same top p\s*:\s*([\d.]+)",
}


def quantize(tools: Path, source: Path, target: Path, mixture: str) -> None:
    """Write one mixture of MIXTURES."""
    base, others = MIXTURES[mixture]
    options = [word for name, kind in others.items() for word in ("--tensor-type", f"{name}={kind}")]
    _run(tools / "llama-quantize", *options, source, target, base, 1)


class Divergence:
    """Compares files with the F32 file on one text; the F32 file's distributions are computed once."""

    def __init__(self, tools: Path, f32: Path, text: Path, chunks: int) -> None:
        self.program = tools / "llama-perplexity"
        self.options = ["-f", text, "-c", 512, "-b", 512, "-t", 1, "--chunks", chunks]
        self.base = text.with_suffix(".kld")
        _run(self.program, "-m", f32, *self.options, "--kl-divergence-base", self.base)

    def measure(self, model: Path) -> dict[str, float]:
        """Perplexity of both, mean KL with its standard error in nats a token, percent of tokens with the same top."""
        log = self.base.with_suffix(".log")
        options = ["-m", model, *self.options, "--kl-divergence-base", self.base, "--kl-divergence", "--log-file", log]
        for _ in range(TRIES):
            log.unlink(missing_ok=True)
            _run(self.program, *options)
            found = {name: re.search(pattern, log.read_text("utf-8")) for name, pattern in _MEASURED.items()}
            if all(found.values()):
                return {name: float(match[1]) for name, match in found.items() if match}
        sys.exit(
            f"error: llama-perplexity does not print all of {', '.join(_MEASURED)}; compare its log with _MEASURED"
        )


def text_of(corpus: Path, part: str) -> str:
    """The documents of one part, a thousand characters of each: all kinds and languages in few tokens."""
    return "\n\n".join(document["text"][:1000] for document in lines(corpus) if document["part"] == part)


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(f"error: {Path(str(command[0])).name}: status {done.returncode}: {last}; `make tools` builds it")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("f32", type=Path, help="what small_moe.export_gguf wrote")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tools", type=Path, default=Path("../build/native/bin"), help="llama.cpp's programs")
    parser.add_argument("--chunks", type=int, default=200, help="windows of 512 tokens to measure on")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        divergences = {}
        for part in ("heldout", "test"):
            text = folder / f"{part}.txt"
            text.write_text(text_of(args.corpus, part), "utf-8")
            divergences[part] = Divergence(args.tools, args.f32, text, args.chunks)
        table, files = {}, {}
        for mixture in MIXTURES:
            files[mixture] = folder / f"{len(files)}.gguf"
            quantize(args.tools, args.f32, files[mixture], mixture)
            row = {"bytes": files[mixture].stat().st_size, **divergences["heldout"].measure(files[mixture])}
            table[mixture] = row
            print(mixture, json.dumps(row), file=sys.stderr, flush=True)
        fitting = [mixture for mixture, row in table.items() if row["bytes"] <= MOST_BYTES]
        if not fitting:
            sys.exit(f"error: no mixture has at most {MOST_BYTES:,} bytes; add a smaller one to MIXTURES")
        chosen = min(fitting, key=lambda mixture: table[mixture]["kl"])
        result = {"chosen": chosen, "heldout": table, "test": divergences["test"].measure(files[chosen])}
        shutil.copy(files[chosen], args.folder / "small.gguf")
        (args.folder / "quantization.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
