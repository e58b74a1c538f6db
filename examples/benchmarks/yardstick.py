"""The measure that Axolotl's maintainers took of PoLoRA (pull request 3938), with SCAO in it: one GPU with 40 GB, hours.

    python examples/benchmarks/yardstick.py --dry-run          # a tiny model on a CPU, minutes: does every part work here?
    python examples/benchmarks/yardstick.py                    # each optimizer at its best known rate
    python examples/benchmarks/yardstick.py --rates 3          # and at the rates on both sides

Llama-3.2-1B, LoRA of rank 32 on all linear maps, OpenMathInstruct-2 packed to 2,048 tokens, 32,768 tokens a step, bfloat16, a
constant rate without warm-up, 1,500 steps, each run by ``axolotl train``. They found AdamW best at 3e-4 (0.4686),
PoLoRA at 3e-2 (0.4556), with AdamW's loss at step 1,076. The pull request does not name alpha, the prompt, the rows that were
held out and the sequences of a micro-batch: these are chosen here, so that losses compare within this script alone. PoLoRA is
its authors' (``pip install git+https://github.com/nikhilgsh/polora.git``); where that is missing, its runs fail and the others
are made.

A finished run is a line of the result file and is not run again; one that was interrupted continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moe_gpu
import provenance
import sweep
import torch
import yaml

MODEL = "meta-llama/Llama-3.2-1B"
DATA = "nvidia/OpenMathInstruct-2"
#: Rates by optimizer, the best known first. SCAO's steps are scaled to AdamW's, of which it takes the rates.
RATES = {"adamw_torch": (3e-4, 1e-4, 1e-3), "polora": (3e-2, 1e-2, 1e-1), "scao": (3e-4, 1e-4, 1e-3)}
#: Rows of the data that are read: more than the steps take, and what is held out of them.
ROWS, HELD_OUT = 300_000, 512
SIZES = {"sequence": 2048, "tokens": 32_768, "rank": 32, "micro_batch": 4}
TINY = {"sequence": 64, "tokens": 128, "rank": 4, "micro_batch": 1}


def cells(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run, the best known rates of all optimizers first."""
    here = torch.cuda.is_available() and not arguments.dry_run
    for place in range(arguments.rates):
        for optimizer in arguments.optimizers:
            yield {
                "benchmark": "yardstick",
                "model": "tiny" if arguments.dry_run else arguments.model,
                "data": "tiny" if arguments.dry_run else DATA,
                "device": torch.cuda.get_device_name() if here else "cpu",
                "optimizer": optimizer,
                "lr": RATES[optimizer][place],
                "steps": arguments.steps,
                "eval_steps": arguments.eval_steps,
                "seed": arguments.seed,
                **(TINY if arguments.dry_run else {**SIZES, "micro_batch": arguments.micro_batch}),
            }


def config(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The YAML of a run, as a dict."""
    tiny, gpu = cell["data"] == "tiny", cell["device"] != "cpu"
    bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    scao = cell["optimizer"] == "scao"
    kind = {"field_instruction": "problem", "field_output": "generated_solution"}
    kind |= {"format": "{instruction}\n", "no_input_format": "{instruction}\n"}
    rows = (
        {"path": str(folder.parent / "rows.jsonl"), "ds_type": "json"}
        if tiny
        else {"path": DATA, "split": f"train_1M[:{ROWS}]"}
    )
    kernels = {} if gpu else dict.fromkeys((f"lora_{part}_kernel" for part in ("qkv", "o", "mlp", "embedding")), False)
    # In the dry run phase 2 is reached, as far as it goes.
    early = {"scao_warmup_steps": 2, "scao_precond_freq": 2, "scao_blend_steps": 2} if scao and tiny else {}
    alone = {"dataset_num_proc": 1, "dataloader_num_workers": 0} if tiny else {}
    return {
        "base_model": str(folder.parent / "model") if tiny else cell["model"],
        "plugins": ["step_clock.Clock", *(["axolotl_plugin.SCAOPlugin"] if scao else [])],
        "optimizer": cell["optimizer"],
        **early,
        **alone,
        "adapter": "lora",
        "lora_r": cell["rank"],
        "lora_alpha": 2 * cell["rank"],
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        **kernels,
        "datasets": [{**rows, "type": kind}],
        "dataset_prepared_path": str(folder.parent / "prepared"),
        "val_set_size": 16 if tiny else HELD_OUT,
        "sequence_len": cell["sequence"],
        "sample_packing": True,
        "eval_sample_packing": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": gpu,
        "micro_batch_size": cell["micro_batch"],
        "gradient_accumulation_steps": cell["tokens"] // (cell["sequence"] * cell["micro_batch"]),
        "max_steps": cell["steps"],
        "learning_rate": cell["lr"],
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": bf16,
        "fp16": gpu and not bf16,
        "tf32": bf16,
        "logging_steps": 1,
        "eval_steps": cell["eval_steps"],
        "save_steps": 10 * cell["eval_steps"],
        "save_total_limit": 1,
        "auto_resume_from_checkpoints": True,
        "output_dir": str(folder / "out"),
        "seed": cell["seed"],
    }


def prepare(folder: Path) -> None:
    """A random model and sums as rows, for the dry run."""
    if (folder / "rows.jsonl").is_file():
        return
    moe_gpu.byte_tokenizer().save_pretrained(folder / "model")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes, **heads)).save_pretrained(
        folder / "model"
    )
    draw = random.Random(0)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(600)]
    rows = [{"problem": f"{one} + {two}", "generated_solution": str(one + two)} for one, two in pairs]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def launch(file: Path) -> None:
    """One run, in a process of its own: the next starts with an empty card.

    Raises:
        subprocess.CalledProcessError: it failed; what it says stands above.
    """
    plugins = Path(__file__).resolve().parent / "plugins"  # this folder has a polora.py, which is not Axolotl's
    paths = os.pathsep.join(filter(None, (str(plugins), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(file), "--launcher", "python"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})


def figures(folder: Path) -> dict[str, Any]:
    """What a finished run has left: losses, seconds, peaks; of steps that were taken twice the later ones."""
    last = max((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    log = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    lines = map(json.loads, (folder / "clock.jsonl").read_text(encoding="utf-8").splitlines())
    steps = list({line["step"]: line for line in lines}.values())
    timed = steps[2:] or steps
    evals = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    return {
        "train_loss": [entry["loss"] for entry in log if "loss" in entry],
        "evals": [{"step": step, "loss": loss} for step, loss in evals.items()],
        "seconds_per_step": round(statistics.median(step["seconds"] for step in timed), 5),
        "optimizer_seconds_per_step": round(statistics.mean(step["optimizer"] for step in timed), 6),
        "peak_active": max((step["active"] for step in steps if "active" in step), default=None),
        "peak_reserved": max((step["reserved"] for step in steps if "reserved" in step), default=None),
    }


def reached(evals: list[dict[str, float]], loss: float) -> float | None:
    """The step at which a loss is first reached, on straight lines between evaluations; None if it is not."""
    before = None
    for now in evals:
        if now["loss"] <= loss:
            if before is None or before["loss"] == now["loss"]:
                return now["step"]
            share = (before["loss"] - loss) / (before["loss"] - now["loss"])
            return before["step"] + share * (now["step"] - before["step"])
        before = now
    return None


def table(records: list[dict[str, Any]]) -> str:
    """In Markdown, the best rate of each optimizer first; steps and seconds against AdamW at its best rate."""
    ends = [(record["evals"][-1]["loss"], record) for record in records]
    adamw = min(
        (end for end in ends if end[1]["cell"]["optimizer"] == "adamw_torch"), key=lambda end: end[0], default=None
    )
    head = "optimizer | rate | held-out loss | AdamW's best at step | fewer steps | s/step | of the optimizer"
    lines = [f"| {head} | peak GiB reserved | active |", "|---|---|---|---|---|---|---|---|---|"]
    for loss, record in sorted(ends, key=lambda end: end[0]):
        cell = record["cell"]
        step = adamw and reached(record["evals"], adamw[0])
        memory = [f"{record[name] / 2**30:.2f}" if record[name] else "" for name in ("peak_reserved", "peak_active")]
        faster = [f"{step:.0f}", f"{cell['steps'] / step:.2f}x"] if step else ["not reached", ""]
        seconds = [f"{record['seconds_per_step']:.3f}", f"{record['optimizer_seconds_per_step']:.4f}"]
        lines.append(
            "| " + " | ".join([cell["optimizer"], f"{cell['lr']:g}", f"{loss:.4f}", *faster, *seconds, *memory]) + " |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing and print the table; 1 where a run fails or there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="default: %(default)s, which asks for its licence on the hub")
    parser.add_argument("--optimizers", nargs="+", choices=RATES, default=list(RATES), help="default: all")
    parser.add_argument("--rates", type=int, choices=(1, 2, 3), default=1, help="rates of each optimizer (default: 1)")
    parser.add_argument("--steps", type=int, help="default: 1500, in the dry run 12")
    parser.add_argument("--eval-steps", type=int, help="steps between evaluations (default: 25, in the dry run 3)")
    parser.add_argument("--micro-batch", type=int, choices=(1, 2, 4, 8, 16), default=4, help="sequences (default: 4)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--folder", type=Path, default=Path("runs/yardstick"), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and sums, on a CPU or a GPU")
    arguments = parser.parse_args(argv)
    arguments.steps = arguments.steps or (12 if arguments.dry_run else 1500)
    arguments.eval_steps = arguments.eval_steps or (3 if arguments.dry_run else 25)
    if arguments.steps % arguments.eval_steps:
        parser.error(f"--steps {arguments.steps} must be a multiple of --eval-steps {arguments.eval_steps}")
    if not torch.cuda.is_available() and not arguments.dry_run:
        print("error: this needs a GPU; --dry-run tries every part on a tiny model", file=sys.stderr)
        return 1
    folder = arguments.folder / "dry" if arguments.dry_run else arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.dry_run:
        prepare(folder)
    results, failed = folder / "yardstick.jsonl", 0
    wanted = list(cells(arguments))
    for cell in wanted:
        done, _ = sweep.read(results)
        if sweep.key(cell) in done:
            continue
        place = folder / f"{cell['optimizer']}-{cell['lr']:g}-{sweep.key(cell)}"
        place.mkdir(exist_ok=True)
        (place / "config.yml").write_text(yaml.safe_dump(config(cell, place), sort_keys=False), encoding="utf-8")
        try:
            launch(place / "config.yml")
        except subprocess.CalledProcessError as error:
            print(f"{cell['optimizer']} at {cell['lr']:g} failed: {error}", file=sys.stderr)
            failed = 1
            continue
        origin = {"versions": provenance.versions("scao"), "machine": provenance.machine()}
        sweep.append(results, {"key": sweep.key(cell), "cell": cell, **figures(place), **origin})
    done, _ = sweep.read(results)
    print(table([done[key] for key in map(sweep.key, wanted) if key in done]))
    return failed


if __name__ == "__main__":
    sys.exit(main())
