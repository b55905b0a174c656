"""Compiled and recorded layers give the vectors of those as they are."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, Remote, pretended_gpu

pytestmark = pytest.mark.once
TEXTS = ["what are tides", "light and water " * 9]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def assert_same_vectors(models: tuple[Any, Any], texts: list[str], dense: float = 3e-6, sparse: float = 3e-6) -> None:
    found, expected = (model.encode_texts(texts, False) for model in models)
    torch.testing.assert_close(found.repr_hidden, expected.repr_hidden, rtol=0, atol=dense)
    torch.testing.assert_close(found.sparse_values, expected.sparse_values, rtol=0, atol=sparse)


@pytest.mark.slow
def test_compiled_layers_give_the_same_vectors(load_release: Callable[..., Any]) -> None:
    """By inductor's own code for a CPU, written once for all layers and lengths."""
    plain = load_release("tiny-llada", "llada-q4p4")
    model = copy.deepcopy(plain)
    model.optimize_for("throughput")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for texts in (TEXTS, [*TEXTS, "tides and light"]):
        assert_same_vectors((model, plain), texts, 1e-5, 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_compiled_layers_take_nothing_from_the_host(load_release: Callable[..., Any]) -> None:
    """Numbers such as a norm's epsilon are in the code; as inputs they would be computed on the CPU at each call."""
    model = copy.deepcopy(load_release("tiny-llada", "llada-q4p4"))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.optimize_for("throughput")
    torch.compiler.reset()
    for layer in model.backbone.layers:
        layer.compile(dynamic=True, backend=keep)
    model.encode_texts(TEXTS, False)
    (graph,) = graphs
    inputs = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    assert sum(isinstance(value, torch.Tensor) for value in inputs) > 10
    assert not [value for value in inputs if isinstance(value, torch.Tensor) and value.dim() == 0]


def test_what_waits_cannot_be_recorded() -> None:
    with pretended_gpu() as gpu:
        values = torch.arange(4.0).to(GPU)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = values * 2
        with pytest.raises(RuntimeError, match="waits for the GPU while a graph is recorded"), torch.cuda.graph(graph):
            bool((values > 2).any())
        values.copy_(values + 1)
        assert doubled.tolist() == [0, 2, 4, 6]
        graph.replay()
        assert doubled.tolist() == [2, 4, 6, 8]
        assert gpu.replays == 1


def test_layers_that_cannot_be_recorded_say_what_to_do(
    load_release: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpu() as gpu:
        model = copy.deepcopy(load_release("tiny-llada", "llada-q4p4"))
        gpu.move(model)
        model.optimize_for("latency", compiled=False)
        model.backbone.norm.register_forward_hook(lambda *values: print(bool((values[2] > 0).any())))
        with pytest.raises(
            RuntimeError, match=r'recorded as a CUDA graph .*; call optimize_for\("throughput"\)\. CUDA'
        ):
            model.encode_texts(TEXTS[:1], False)


@pytest.fixture(params=["llada", "dream"])
def recorded(
    request: pytest.FixtureRequest, load_release: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, Any, Any]]:
    """A model on the CPU, the same with recorded layers on a pretended GPU, and that."""
    plain = load_release(f"tiny-{request.param}", f"{request.param}-q4p4")
    code = sys.modules[type(plain).__mro__[1].__module__]  # optimized_layers, which may be the release's own
    monkeypatch.setattr(code, "PLAIN_WEIGHTS", (torch.nn.Parameter, Remote))
    with pretended_gpu() as gpu:
        model = copy.deepcopy(plain)
        gpu.move(model)
        model.optimize_for("latency", compiled=False)
        yield plain, model, gpu


def test_a_single_text_is_run_as_recorded(recorded: tuple[Any, Any, Any]) -> None:
    """Nothing that is recorded waits for the GPU, and what was recorded for one text is right for others."""
    plain, model, gpu = recorded
    single = [TEXTS[:1], TEXTS[1:], ["tides and light"], TEXTS[:1]]
    for number, texts in enumerate(single, 1):
        assert_same_vectors((model, plain), texts)
        assert gpu.replays == number
    assert_same_vectors((model, plain), TEXTS)
    assert gpu.replays == len(single)  # not of a batch
    assert not gpu.waits


def test_a_padded_single_text_and_one_too_long(recorded: tuple[Any, Any, Any]) -> None:
    plain, model, gpu = recorded
    ids, mask = plain.tokenize(TEXTS, False)
    found, expected = (one.encode(ids[:1], mask[:1], False, True) for one in (model, plain))
    assert gpu.replays == 1
    torch.testing.assert_close(found.repr_hidden.cpu(), expected.repr_hidden, rtol=0, atol=3e-6)
    model._recorded.LENGTHS = (8,)
    model.encode_texts(TEXTS[:1], False)
    assert gpu.replays == 1


def test_weights_that_move_are_recorded_anew(recorded: tuple[Any, Any, Any]) -> None:
    plain, model, gpu = recorded
    before = model.encode_texts(TEXTS[:1], False).repr_hidden
    head = copy.deepcopy(plain.backbone.layers[0].self_attn.o_proj).requires_grad_(False)
    head.weight.mul_(2)
    gpu.move(head)
    model.backbone.layers[0].self_attn.o_proj = head
    assert torch.equal(model.encode_texts(TEXTS[:1], False).repr_hidden, before)  # of where the weights were
    model._apply(lambda weight: weight)  # as model.to(...) does
    assert (model.encode_texts(TEXTS[:1], False).repr_hidden - before).abs().max() > 0.01


def joint_layers(model: Any) -> list[Any]:
    """Make, and return, what runs in the place of a model's layers but the last for a single text."""
    model._recorded._joint = model._recorded._join()
    return list(model._recorded._joint)


def test_a_single_text_has_joint_products(recorded: tuple[Any, Any, Any]) -> None:
    plain, model, _ = recorded
    assert_same_vectors((model, plain), TEXTS)
    assert not model._recorded._joint
    assert_same_vectors((model, plain), TEXTS[:1])
    assert len(model._recorded._joint) == 3


def test_joint_products_take_no_memory(load_release: Callable[..., Any]) -> None:
    plain = load_release("tiny-dream", "dream-q4p4")
    model = copy.deepcopy(plain)
    model.optimize_for("latency", compiled=False)
    for layer, joint in zip(model.backbone.layers, joint_layers(model), strict=False):
        attention, mlp = layer.self_attn, layer.mlp
        for parts, (weight, bias) in (
            ([attention.q_proj, attention.k_proj, attention.v_proj], joint._attention),
            ([mlp.gate_proj, mlp.up_proj], joint._mlp),
        ):
            assert len(weight) == sum(part.out_features for part in parts)
            assert {part.weight.untyped_storage().data_ptr() for part in parts} == {weight.untyped_storage().data_ptr()}
            assert (bias is None) == (parts[0].bias is None)
            if bias is not None:
                assert {part.bias.untyped_storage().data_ptr() for part in parts} == {bias.untyped_storage().data_ptr()}
    assert_same_vectors((model, plain), TEXTS)


def test_joint_weights_are_saved_each_by_itself(load_release: Callable[..., Any], tmp_path: Any) -> None:
    plain = load_release("tiny-dream", "dream-q4p4")
    model = copy.deepcopy(plain)
    model.optimize_for("latency", compiled=False)
    assert len(joint_layers(model)) == 3
    model.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, torch_dtype=torch.float32)
    other = copy.deepcopy(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(other.state_dict()[name], value), name
    storages = {weight.untyped_storage().data_ptr() for weight in other.backbone.parameters()}
    assert len(storages) == len(list(other.backbone.parameters()))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_joint_layers_see_what_the_layers_see(load_release: Callable[..., Any], implementation: str) -> None:
    """Texts of several lengths, padded; with biases and fewer heads of keys than of queries."""
    plain = load_release("tiny-dream", "dream-q4p4", attn_implementation=implementation)
    model = copy.deepcopy(plain)
    model.optimize_for("latency", compiled=False)
    joint_layers(model)
    for layer in model.backbone.layers[:-1]:
        layer.forward = None  # stays out of it
    ids, mask = plain.tokenize([*TEXTS, ""], False)
    positions = plain.texts.mask_positions(ids, False)
    found, expected = model._recorded._states(ids, mask, positions), plain.states_at(ids, mask, positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - plain.states_at(ids, torch.ones_like(mask), positions)).abs().max() > 0.01


@pytest.mark.parametrize("change", ["hook", "other kind", "other dtype", "flash attention"])
def test_layers_that_are_not_plain_are_not_joint(load_release: Callable[..., Any], change: str) -> None:
    model = copy.deepcopy(load_release("tiny-llada", "llada-q4p4"))
    model.optimize_for("latency", compiled=False)
    layer = model.backbone.layers[1]
    if change == "hook":
        layer.mlp.up_proj.register_forward_hook(lambda *values: None)
    elif change == "other kind":
        layer.self_attn.v_proj.weight = torch.nn.Parameter(torch.nn.Buffer(layer.self_attn.v_proj.weight.detach()))
        layer.self_attn.v_proj.__class__ = type("Quantised", (torch.nn.Linear,), {})
    elif change == "other dtype":
        layer.self_attn.k_proj.half()
    else:
        model.config._attn_implementation = "flash_attention_2"
    assert joint_layers(model) == []


@pytest.mark.slow
@torch.no_grad()
def test_compiled_joint_layers_share_one_code(load_release: Callable[..., Any]) -> None:
    plain = load_release("tiny-llada", "llada-q4p4")
    model = copy.deepcopy(plain)
    model.optimize_for("latency")
    joint_layers(model)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for text in (TEXTS[0], TEXTS[1], "tides and light"):
        ids, mask = plain.tokenize([text], False)
        positions = plain.texts.mask_positions(ids, False)
        found, expected = model._recorded._states(ids, mask, positions), plain.states_at(ids, mask, positions)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_a_single_text_goes_up_and_comes_back_in_one_copy_each(recorded: tuple[Any, Any, Any]) -> None:
    _, model, gpu = recorded
    model.encode_texts(TEXTS[:1], False)
    gpu.copies.clear()
    model.encode_texts(TEXTS[:1], False)
    assert gpu.copies == {"up": 1, "down": 1}


def test_texts_in_batches_of_one_are_run_as_recorded(recorded: tuple[Any, Any, Any]) -> None:
    """They are packed ahead, in their own lengths, which are not the graphs'."""
    plain, model, gpu = recorded
    found, expected = (one.encode_texts([*TEXTS, "tides and light"], False, batch_size=1) for one in (model, plain))
    for name in ("repr_hidden", "sparse_values"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=3e-6)
    assert gpu.replays == 3
    assert not gpu.waits


def test_what_is_recorded_follows_what_is_asked_for(recorded: tuple[Any, Any, Any]) -> None:
    """The sparse vectors and their sizes, the steps, the norm: also when they change after a text was recorded."""
    plain, model, gpu = recorded
    ways: list[dict[str, Any]] = [{}, {"compute_sparse": False}, {"content_filter": False}, {"sparse_top_k": 3}, {}]
    settings: list[dict[str, Any]] = [{}, {"normalize": False}, {"num_denoise_steps": 2}, {"sparse_top_k": 5}]
    for changes in settings:
        before = {name: getattr(plain.config, name) for name in changes}
        for one in (plain, model):
            vars(one.config).update(changes)
        for way in ways:
            found, expected = (one.encode_texts(TEXTS[1:], False, **way) for one in (model, plain))
            assert found.keys() == expected.keys()
            for name in expected.keys() - {"sparse_indices"}:  # words of equal weight, but for rounding, change places
                torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=3e-6)
        for one in (plain, model):
            vars(one.config).update(before)
    assert gpu.replays == len(ways) * len(settings)
    assert not gpu.waits


def test_vectors_of_a_recorded_text_are_its_own(recorded: tuple[Any, Any, Any]) -> None:
    """The next text does not write over them, and a file may hold them: tensors that share memory it may not."""
    _, model, _ = recorded
    ids, mask = model.tokenize(TEXTS[:1], False)
    first = model.encode(ids, mask, False, True)
    before = {name: values.cpu().clone() for name, values in first.items()}
    model.encode(*model.tokenize(["tides and light"], False), False, True)
    there = [values.held for values in first.values()]
    here = list(model.encode_texts(TEXTS[:1], False).values())
    for vectors in (there, here):
        assert len({values.untyped_storage().data_ptr() for values in vectors}) == 3
    for name, values in first.items():
        assert torch.equal(values.cpu(), before[name])


def test_words_that_no_graph_has_room_for_and_watched_models_are_run_as_written(recorded: tuple[Any, Any, Any]) -> None:
    plain, model, gpu = recorded
    ids, mask = plain.tokenize(TEXTS[:1], False)
    words = [list(range(100, 300))]
    found, expected = (one.encode(ids, mask, False, True, content_token_ids=words) for one in (model, plain))
    torch.testing.assert_close(found.sparse_values.cpu(), expected.sparse_values, rtol=0, atol=3e-6)
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda *values: seen.append(values[2]))
    model.encode_texts(TEXTS[:1], False)
    assert len(seen) == 1
    assert gpu.replays == 0
    handle.remove()
    model.encode_texts(TEXTS[:1], False)
    assert len(seen) == gpu.replays == 1


def test_queries_of_other_budgets_have_graphs_of_their_own(load_release: Callable[..., Any]) -> None:
    table = {"length": [3], "entropy": [], "num_query_masks": [[1], [4]]}
    plain = load_release("tiny-llada", "llada-q4p4", query_budget_table=table)
    with pretended_gpu() as gpu:
        model = copy.deepcopy(plain)
        gpu.move(model)
        model.optimize_for("latency", compiled=False)
        for text in ("tides", "what moves the tides of all oceans", "light"):
            found, expected = (one.encode_texts([text], True) for one in (model, plain))
            assert torch.equal(found.repr_mask, expected.repr_mask)
            torch.testing.assert_close(found.repr_hidden, expected.repr_hidden, rtol=0, atol=3e-6)
        assert gpu.replays == 3


def test_what_cannot_be_optimised(load_release: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_release("tiny-llada", "llada-q4p4")
    with pytest.raises(ValueError, match='must be "throughput" or "latency", got \'speed\''):
        model.optimize_for("speed")
    monkeypatch.setattr(model.backbone.norm, "_hf_hook", object(), raising=False)
    with pytest.raises(ValueError, match="needs a model on one device"):
        model.optimize_for("throughput")


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["as-written", "compiled"])
@pytest.mark.parametrize("goal", ["throughput", "latency"])
def test_on_cuda_the_vectors_are_the_same(load_release: Callable[..., Any], goal: str, compiled: bool) -> None:
    plain = copy.deepcopy(load_release("tiny-llada", "llada-q4p4")).to("cuda", torch.bfloat16)
    model = copy.deepcopy(plain)
    model.optimize_for(goal, compiled=compiled)
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:], ["tides and light"], TEXTS[:1]):
        found, expected = (one.encode_texts(texts, False) for one in (model, plain))
        cosines = (found.repr_hidden * expected.repr_hidden).sum(dim=-1)
        print(f"{goal}, compiled {compiled}: least cosine {float(cosines.min()):.6f}")
        assert cosines.min() > 0.998
        torch.testing.assert_close(found.sparse_values, expected.sparse_values, rtol=0, atol=0.1)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_a_graph_is_replayed_in_place_of_the_layers(load_release: Callable[..., Any], dtype: Any) -> None:
    plain = copy.deepcopy(load_release("tiny-llada", "llada-q4p4")).to("cuda", dtype)
    model = copy.deepcopy(plain)
    model.optimize_for("latency", compiled=False)
    for number, texts in enumerate([TEXTS[:1], TEXTS[1:], ["tides and light"], TEXTS[1:]]):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = model.encode_texts(texts, False, compute_sparse=False)
        launched = {event.key: event.count for event in profile.key_averages()}
        layers_ran = "aten::scaled_dot_product_attention" in launched
        assert layers_ran == (number < 2)  # to be recorded, once for each length
        expected = plain.encode_texts(texts, False, compute_sparse=False)
        error = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(found.repr_hidden, expected.repr_hidden, rtol=0, atol=error)
