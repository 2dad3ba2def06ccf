"""Write a checkpoint as GGUF in float32: `python -m small_moe.export_gguf CHECKPOINT TOKENS OUT.gguf`.

`small_moe.quantize` makes the file that ships of it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer

from tiny_moe.model import Config
from tiny_moe.olmoe_gguf import write_gguf

from .model import SmallMoE
from .sources import packages
from .tokens import SPECIAL_TOKENS

NAMES = {"help": "help of an office suite", "man": "manual pages", "code": "source code"}  # of kinds; else as it is


def load(checkpoint: Path) -> SmallMoE:
    """The model that train.py saved."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model = SmallMoE(Config(**state["config"]))
    model.load_state_dict(state["model"])
    return model.eval()


def describe(config: Config, writer: gguf.GGUFWriter) -> None:
    """Add what the model is: the general.* fields, with each package that it read as a data set."""
    kinds = sorted({NAMES.get(package.kind, package.kind) for package in packages()})
    writer.add_type("model")
    writer.add_name(f"Small MoE, {config.experts} experts, top-{config.top_k}")
    writer.add_finetune("Base")
    writer.add_description(
        "A small OLMoE trained as usual, by the next-token loss with load balancing and router z-loss; no expert was "
        f"planted. It continues text ({', '.join(kinds)}) and was not taught to answer: a base model without a chat "
        "template, for experiments with its experts and of no other use. Recipe: examples/small_moe of "
        "steermoe-local."
    )
    writer.add_license("other")
    writer.add_license_name(
        "MIT for what the recipe's authors made; the texts that it was trained on have licences of their own, which "
        "the data sets' descriptions name, and are not part of it"
    )
    writer.add_tags(["text-generation", "mixture-of-experts", "base-model"])
    writer.add_languages(["en", "de", "fr", "es", "it"])
    for i, package in enumerate(packages()):
        writer.add_dataset_name(i, package.name)
        writer.add_dataset_organization(i, "Debian")
        writer.add_dataset_description(i, f"{package.kind}; licence: {package.licence}")


def export(model: SmallMoE, tokenizer: Tokenizer, path: Path) -> None:
    """Write the model with every tensor in F32."""
    about = partial(describe, model.config)
    write_gguf(path, model.config, model.state_dict(), tokenizer, SPECIAL_TOKENS, about, np.float32)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="last.pt of a run")
    parser.add_argument("tokens", type=Path, help="the folder that small_moe.tokens wrote")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    export(load(args.checkpoint), Tokenizer.from_file(str(args.tokens / "tokenizer.json")), args.output)


if __name__ == "__main__":
    main()
