"""The commands of ``scao-hf``: options, tables and exit codes. What they show is worked out in the other modules."""

from __future__ import annotations

import io
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from scao_hf import __version__
from scao_hf.tools import ToolError, writing

if TYPE_CHECKING:
    from scao_hf.tools.plan import Plan

#: What a plan without a YAML does not know: who trains.
TRAINER_LOGITS = (
    "logits are counted as transformers.Trainer holds them; TRL's SFTTrainer computes its loss in chunks and needs less"
)

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


# What arguments mean is in the commands' own texts: with some releases of click, typer does not show their help.


def _version(asked: bool) -> None:
    if asked:
        print(f"scao-hf {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Plan, compare, watch and check fine-tuning with SCAO."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may hold bytes that are not text


@contextmanager
def _quiet() -> Iterator[None]:
    """Tell the user's mistakes in one line, and silence what transformers and its optional parts print on import."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ToolError as error:
        print(f"scao-hf: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    finally:
        logging.disable(before)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if size > 2**16 else f"{size / 2**20:.3f}"


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(show_default=False)] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Instead of a YAML: a folder or a name on the hub.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    targets: Annotated[str | None, typer.Option(help='Layers with LoRA: "all", or names with commas.')] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in a micro-batch.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Gradient checkpointing.")] = None,
    four_bit: Annotated[bool | None, typer.Option(help="4-bit NF4 weights.")] = None,
    upcast: Annotated[
        bool | None, typer.Option(help="After peft.prepare_model_for_kbit_training: embeddings and norms in 32 bit.")
    ] = None,
    gpu: Annotated[float | None, typer.Option(help="Your card's memory in GB, besides 8, 12, 16 and 24.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes as JSON instead of a table.")] = False,
) -> None:
    """Will it fit? Shows what fills the card's memory before anything is downloaded or trained.

    CONFIG is an Axolotl YAML; without one, --model names a model. Options override the YAML.
    """
    with _quiet():
        from scao_hf.tools import settings as asked
        from scao_hf.tools.axolotl_yaml import from_yaml
        from scao_hf.tools.plan import make_plan

        if config is None and not model:
            raise ToolError("nothing to plan: pass an Axolotl YAML, or --model NAME (try --model Qwen/Qwen2.5-3B)")
        if gpu is not None and not 0 < gpu < 2**20:
            raise ToolError(f"--gpu is {gpu:g}: it must be above 0 and below {2**20}, for example --gpu 16")
        base = from_yaml(config) if config is not None else asked.Settings(model or "", notes=(TRAINER_LOGITS,))
        chosen = asked.with_overrides(
            base,
            model=model,
            rank=lora_r,
            targets=None if targets is None else asked.parse_targets(targets),
            batch=batch,
            sequence=seq,
            checkpointing=checkpointing,
            four_bit=four_bit,
            eight_bit=False if four_bit else None,
            upcast=upcast,
        )
        result = make_plan(chosen)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        _show_plan(result, gpu)


def _show_plan(plan: Plan, gpu: float | None) -> None:
    from scao_hf.tools.plan import CARDS, OVERHEAD, USABLE, advice
    from scao_hf.tools.simulate import STATED_ERROR

    console = Console(highlight=False)
    chosen = plan.settings
    lora = f", {plan.lora_pairs} LoRA pairs of rank {chosen.rank}" if chosen.adapter else ""
    console.print(
        f"[bold]{escape(chosen.model)}[/]: {plan.parameters / 1e9:.2f} billion parameters (from {escape(plan.source)}), "
        f"{plan.trainable / 1e6:.2f} million trainable{lora}; batch {chosen.batch} x {chosen.sequence} tokens"
        f"{'' if chosen.objective == 'sft' else f', chosen and rejected ({chosen.objective})'}, "
        f"gradient checkpointing {'on' if chosen.checkpointing else 'off'}"
    )
    table = Table("on the card", Column("MiB", justify="right"), "")
    for row in plan.rows:
        known = "exact" if row.exact else "estimate"
        table.add_row(row.name, _mib(row.size), f"{known}: {row.remark}" if row.remark else known)
    table.add_section()
    words = f"{plan.total / 2**30:.2f} GiB, give or take {_mib(plan.margin)} MiB"
    table.add_row("peak", f"[bold]{_mib(plan.total)}[/]", words)
    console.print(table)
    state, (rival, size) = plan.scao["peak"], plan.rival
    console.print(
        f"Optimizer state: SCAO {_mib(plan.scao['total'])} MiB ({_mib(state)} MiB at its peak), {escape(rival)} "
        f"{_mib(size)} MiB: SCAO's peak is {_mib(abs(state - size))} MiB {'more' if state > size else 'less'}."
    )
    if state > 1.5 * size and plan.small < 0.75 * state:
        console.print(
            f"With `scao_moment_dtype: int8` and `scao_use_int8_ema: true` it is {_mib(plan.small)} MiB at its peak."
        )
    console.print(
        f"Activations, logits and loss: {_mib(plan.peaks['on'].peak)} MiB with gradient checkpointing, "
        f"{_mib(plan.peaks['off'].peak)} MiB without."
    )
    columns = [Column(title, justify="right", overflow="fold") for title in ("card", "usable")]
    cards = Table(*columns, *(Column(title, overflow="fold") for title in ("verdict", "to make it fit")))
    for card in sorted({*map(float, CARDS), *([gpu] if gpu else [])}):
        free = plan.free(card)
        room, hint = f"{abs(free) / 2**30:.1f} GiB", ""
        if free < 0:
            verdict = f"[red]does not fit[/], {room} too much"
        else:
            verdict = f"{'[green]fits[/]' if free >= plan.margin else '[yellow]tight[/]'}, {room} free"
        if free < plan.margin:
            changes = advice(plan, card)
            hint = "\n".join(f"{text} (-{size / 2**30:.1f} GiB)" for text, size in changes)
            if (left := free + sum(size for _, size in changes)) < 0:
                hint = f"a smaller model: the settings can save all but {-left / 2**30:.1f} GiB of it"
        cards.add_row(f"{card:g} GB{' (yours)' if card == gpu else ''}", f"{card * USABLE:.1f} GiB", verdict, hint)
    console.print(cards)
    for note in plan.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}.")
    console.print(
        "[dim]Exact: to the byte, before the allocator's rounding. Estimate: from a training step on the meta device, "
        f"within {STATED_ERROR:.0%} of the peak; {_mib(OVERHEAD)} MiB for CUDA are an assumption.[/]"
    )


@app.command()
def compare(
    config: Path,
    arguments: Annotated[list[str] | None, typer.Argument()] = None,
    *,
    steps: Annotated[int, typer.Option(help="Length of each run.")] = 100,
    lr: Annotated[
        str, typer.Option(help="config: the configuration's own for all; auto: each optimizer's best; or a number.")
    ] = "config",
    seeds: Annotated[int, typer.Option(help="Seeds for each optimizer; 3 or more to trust a small gap.")] = 1,
    against: Annotated[
        str | None,
        typer.Option(help="The other optimizers, with commas; adamw_torch, or the YAML's own, if not given."),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE: change a key of the YAML; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs/compare"),
) -> None:
    """Is it better for my run? The same data in the same order with AdamW and with SCAO; a table and a page.

    CONFIG is an Axolotl YAML, or a Python script that trains with a transformers Trainer; ARGUMENTS after -- are the script's.

    Repeat the command to resume where it was stopped: finished runs are kept, the others continue from their checkpoints.
    """
    console = Console(highlight=False)
    with _quiet():
        from scao_hf.tools import arms, comparison

        if seeds < 1:
            raise ToolError(f"--seeds is {seeds}: it must be at least 1, and 3 to tell a small gap from chance")
        rate = comparison.parse_rate(lr)
        job = arms.Job(config, steps, out, tuple(arguments or ()), arms.parse_changes(changes or []))
        optimizers = [*arms.rivals_of(job, against), "scao"]
        runs = comparison.most_runs(rate, seeds, len(optimizers))
        names = f"{', '.join(optimizers[:-1])} and scao"
        print(f"{'' if rate else 'Up to '}{runs} runs of {steps} steps, {names}, into {out}", flush=True)
        if job.note:
            console.print(f"[yellow]Note:[/] {escape(job.note)}; the runs with SCAO are given it.")
        # A notebook's shell asks for colours without being a terminal: bars would be thousands of lines there.
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        estimated = ""
        with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as bars:

            def watch(arm: arms.Arm) -> Callable[[arms.Outcome], None]:
                text = f"{escape(arm.optimizer)}{f', seed + {arm.seed}' if arm.seed else ''}"
                task = bars.add_task(text, total=steps)
                if bars.disable:
                    print(f"Running {text}", flush=True)

                def show(outcome: arms.Outcome) -> None:
                    nonlocal estimated
                    rate = f", learning rate {outcome.learning_rate:g}" if outcome.learning_rate > 0 else ""
                    bars.update(task, completed=len(outcome.losses), description=text + rate)
                    if not estimated and (estimated := comparison.estimate(outcome, runs * steps)):
                        bars.console.print(estimated)

                return show

            try:
                sides = comparison.compare(job, optimizers, rate, seeds, watch)
            except KeyboardInterrupt:
                bars.stop()
                print(f"scao-hf: interrupted; repeat the command to resume from {out}", file=sys.stderr)
                raise typer.Exit(130) from None
        table = Table("" if seeds == 1 else "first seed")
        for side in sides:
            table.add_column(escape(side.optimizer), justify="right")
        for name, values in comparison.summary(sides):
            table.add_row(name, *values)
        if table.row_count:
            console.print(table)
        print(*comparison.verdict(sides), sep="\n")
        seeds_in_words = f"{seeds} seed{'s' if seeds > 1 else ''}"
        about = f"{config}, {steps} steps a run; {len(optimizers)} optimizers, {seeds_in_words}, --lr {lr}."
        print(*comparison.write(sides, out, about), sep="\n")
    raise typer.Exit(1 if any(side.failure for side in sides) else 0)


@app.command()
def migrate(
    config: Path, out: Annotated[Path | None, typer.Option(help="The new YAML; CONFIG.scao.yml if not given.")] = None
) -> None:
    """Writes an Axolotl YAML for another optimizer as one for SCAO, and shows what it changes and why.

    Exit code 1: SCAO will refuse the result until something else is changed; it says what.
    """
    with _quiet():
        from scao_hf.tools.migrate import migrate as rewrite

        result = rewrite(config)
        target = out or config.with_name(f"{config.stem}.scao{config.suffix}")
        changed = result.after != result.before
        if write := changed or out is not None:
            with writing(target):
                if target.is_file() and target.read_text(encoding="utf-8", errors="replace") != result.after:
                    raise ToolError(f"{target} exists with other content: remove it, or choose another with --out")
                target.write_text(result.after, encoding="utf-8", newline=result.newline)
    if not changed:
        print(f"{config}: nothing to change, it trains with SCAO already")
    for line in result.diff(str(config), str(target)):
        print(line)
    for title, sentences in (
        ("Why", result.reasons),
        ("Note", result.warnings),
        ("SCAO will refuse this until you change", result.problems),
    ):
        if sentences:
            print(f"{title}:", *(f"  - {sentence}" for sentence in sentences), sep="\n")
    if write:
        name = shlex.quote(str(target))
        # Without --against, compare would take AdamW: the new YAML does not name the former optimizer.
        against = "" if result.former in ("scao", "adamw_torch") else f" --against {shlex.quote(result.former)}"
        then = "" if result.problems else f". Next: scao-hf plan {name}, then scao-hf compare {name}{against}"
        print(f"Written: {target}{then}")
    raise typer.Exit(1 if result.problems else 0)


@app.command()
def report(
    run_dir: Path,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; the run's folder if not given.")] = None,
) -> None:
    """What did the run do? Writes one HTML page and one PNG from a run's trainer_state.json.

    RUN_DIR is the output folder of a Trainer or of Axolotl, a checkpoint in it, or the Axolotl YAML that names it.
    """
    with _quiet():
        from scao_hf.tools.run_report import write_report

        result = write_report(run_dir, out)
    print(*result.findings, result.html, result.png, sep="\n")


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The rows and the problems as JSON.")] = False,
) -> None:
    """Is the installation sound? Versions, backend, self-test; a block to paste into a bug report.

    With CONFIG, an Axolotl YAML: also whether it trains with this SCAO.
    """
    with _quiet():
        from scao_hf.tools.doctor import examine

        note = None
        if config:  # reading it needs transformers
            from scao_hf.tools.axolotl_yaml import plugin_note, read_yaml

            note = plugin_note(read_yaml(config))
        found = examine()
    if as_json:
        print(json.dumps({"rows": dict(found.rows), "problems": found.problems, "note": note}, indent=2))
    else:
        print(found.text)
        if note:
            print(f"{config}: {note}.")
    raise typer.Exit(1 if found.problems else 0)
