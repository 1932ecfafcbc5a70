"""Token routing: choices of patches, and TREAD and SPRINT against loops over tokens."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erw.config import Flow, Model, Run, Sample, from_dict, to_dict
from erw.errors import ConfigError
from erw.models import SiT
from erw.plan import Align, Plan, Routing, repa
from erw.recipes import names, recipe, tiny
from erw.routing import Route, choose

SIZE: dict[str, Any] = dict(input_size=8, patch=2, width=32, depth=4, heads=2, num_classes=10)
LIGHTNING = {"rope": True, "norm": "rms", "mlp": "swiglu", "qk_norm": True}
T = 16


def network(**options: Any) -> SiT:
    """A network with all weights away from zero and from each other."""
    torch.manual_seed(0)
    net = SiT(**SIZE | options)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def inputs(net: SiT, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    shape = (4 * 64 + net.class_token,) if net.class_token else (4, 8, 8)
    x = torch.randn(3, *shape, generator=rng, dtype=dtype)
    return x, torch.rand(3, generator=rng, dtype=dtype), torch.tensor([3, 10, 0])


# -- choices --------------------------------------------------------------------------------------


def test_one_patch_of_each_cell_any_of_the_four_as_likely() -> None:
    u = torch.rand(4000, 36, generator=torch.Generator().manual_seed(0))
    kept = choose(u, 0.25, "grid")
    assert kept.shape == (4000, 9) and bool((kept.diff(dim=1) > 0).all())
    counts = torch.zeros(36)
    for row in kept.tolist():
        assert len({(k // 6 // 2, k % 6 // 2) for k in row}) == 9
        counts[row] += 1
    assert (counts / 4000 - 0.25).abs().max() < 0.035  # five deviations


def test_a_share_of_all_patches_any_as_likely() -> None:
    u = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0))
    kept = choose(u, 0.3)
    assert kept.shape == (4000, 5) and bool((kept.diff(dim=1) > 0).all())
    assert (kept.flatten().bincount() / 4000 - 5 / 16).abs().max() < 0.037
    pairs = ((kept == 2).any(1) & (kept == 3).any(1)).float().mean()
    assert float(pairs) == pytest.approx(5 * 4 / (16 * 15), abs=0.025)  # drawn without order


# -- the forward, token by token ------------------------------------------------------------------


def by_hand(net: SiT, x: Tensor, t: Tensor, y: Tensor, route: Route, blocks: range) -> Tensor:
    """The output, image by image, with lists of tokens; `blocks` are routed."""
    lead = int(net.class_token > 0)
    c = F.silu(net.t_embedder(t) + net.y_embedder(y)).unsqueeze(1)
    outputs = []
    for i in range(len(x)):
        latent, token = net.split(x[i : i + 1]) if lead else (x[i : i + 1], None)
        tokens = list((net.x_embedder(latent) + net.pos_embed)[0])
        if token is not None:
            tokens.insert(0, net.wg_norm(net.cls_projectors2(token))[0])
        kept = range(T) if route.kept is None else route.kept[i].tolist()
        seen = [*range(lead), *(int(k) + lead for k in kept)]
        dropped = route.dropped if isinstance(route.dropped, bool) else bool(route.dropped[i])

        def run(block: Any, which: list[int], tokens: list[Tensor], i: int = i) -> None:
            rope = None if net.rope is None else net.rope[:, which]
            after = block(torch.stack([tokens[k] for k in which])[None], c[i : i + 1], rope)[0]
            for number, k in enumerate(which):
                tokens[k] = after[number]

        for depth, block in enumerate(net.blocks, start=1):
            if depth == blocks[0]:
                before = list(tokens)
            run(block, seen if depth in blocks else list(range(len(tokens))), tokens)
            if depth == blocks[-1] and net.fusion is not None:
                for k in range(len(tokens)):
                    g = net.mask_token if dropped or k not in seen else tokens[k]
                    tokens[k] = net.fusion.weight @ torch.cat([before[k], g]) + net.fusion.bias
        patches, cls = net.final_layer(torch.stack(tokens)[None], c[i : i + 1])
        image = torch.zeros(4, 8, 8, dtype=x.dtype)
        for k, patch in enumerate(patches[0]):
            row, column = 2 * (k // 4), 2 * (k % 4)
            image[:, row : row + 2, column : column + 2] = patch.view(2, 2, 4).permute(2, 0, 1)
        outputs.append(image.flatten() if cls is not None else image)
        if cls is not None:
            outputs[-1] = torch.cat([outputs[-1], cls[0]])
    return torch.stack(outputs)


@pytest.mark.parametrize("grid", [False, True], ids=["uniform", "grid"])
@pytest.mark.parametrize("kind", ["tread", "sprint"])
@pytest.mark.parametrize(
    "options",
    [{}, LIGHTNING, {"class_token": 24}, {"class_token": 24, "rope": True}],
    ids=["plain", "lightning", "reg", "reg and rope"],
)
def test_a_routed_forward_is_that_of_loops_over_tokens(
    options: dict[str, Any], kind: str, grid: bool
) -> None:
    net = network(**options, fusion=(2, 3) if kind == "sprint" else ())
    kept = choose(
        torch.rand(3, T, generator=torch.Generator().manual_seed(2)),
        0.25,
        "grid" if grid else "uniform",
    )
    routes = [Route((2, 3), kept), Route((1, 4), kept)]
    if kind == "sprint":
        some = torch.tensor([False, True, False])
        routes = [Route(kept=kept), Route(kept=kept, dropped=some), Route(dropped=some)]
    exact = 1e-6 if "norm" in options else 1e-11  # an RMS norm is taken in float32
    for dtype, close in ((torch.float64, exact), (torch.float32, 1e-4)):
        net.to(dtype)
        x, t, y = inputs(net, dtype)
        for route in routes:
            first, last = net.fused or route.blocks
            expected = by_hand(net, x, t, y, route, range(first, last + 1))
            torch.testing.assert_close(
                net(x, t, y, route=route), expected, atol=close * 10, rtol=close
            )


@pytest.mark.parametrize("options", [{}, {"rope": True}, {"class_token": 24}])
@pytest.mark.parametrize("fusion", [(), (2, 3)])
def test_to_keep_everything_is_dense_to_the_bit(
    options: dict[str, Any], fusion: tuple[int, ...]
) -> None:
    net = network(**options, fusion=fusion)
    everything = Route((2, 3), torch.arange(T).expand(3, -1))
    assert torch.equal(net(*inputs(net), route=everything), net(*inputs(net)))


def test_taps_have_the_tokens_that_are_there() -> None:
    net = network(class_token=24, rope=True)
    kept = torch.tensor([[1, 5], [0, 15], [3, 4]])
    hidden = net(*inputs(net), tap=(1, 2, 3, 4), route=Route((2, 3), kept)).hidden
    assert {depth: h.shape[1] for depth, h in hidden.items()} == {1: 17, 2: 3, 3: 3, 4: 17}
    # After the last routed block the others are as they were before the first.
    after = net(*inputs(net), tap=(1,), route=Route((2, 3), kept))
    h, bare = hidden[3], after.hidden[1].clone()
    for i, row in enumerate(kept):
        bare[i, [0, *(row + 1)]] = h[i]
    c = F.silu(net.t_embedder(inputs(net)[1]) + net.y_embedder(inputs(net)[2])).unsqueeze(1)
    torch.testing.assert_close(net.blocks[3](bare, c, net.rope), hidden[4])


# -- gradients ------------------------------------------------------------------------------------


def test_bypassed_tokens_reach_their_own_patch_alone_and_kept_ones_each_other() -> None:
    """All blocks routed: the Jacobian of output patches by input patches, in blocks of one each."""
    kept = torch.tensor([2, 7, 8, 13])
    others = [k for k in range(T) if k not in kept]
    for kind in ("tread", "sprint"):
        net = network(fusion=(1, 4) if kind == "sprint" else ())
        x, t, y = (part[:1] for part in inputs(net))

        def patches(x: Tensor, net: SiT = net, t: Tensor = t, y: Tensor = y) -> Tensor:
            out = net(x, t, y, route=Route((1, 4), kept[None]))
            return out.view(4, 4, 2, 4, 2).permute(1, 3, 0, 2, 4).reshape(T, 16)

        def sizes(net: Any = patches, x: Tensor = x) -> Tensor:
            jacobian = torch.autograd.functional.jacobian(net, x)[:, :, 0]  # (T, 16, 4, 8, 8)
            each = jacobian.view(T, 16, 4, 4, 2, 4, 2).abs()
            return each.sum((1, 2, 4, 6)).view(T, T)  # (output patch, input patch)

        reaches = sizes() > 0
        expected = torch.eye(T, dtype=torch.bool)
        expected[kept[:, None], kept] = True
        assert torch.equal(reaches, expected), kind
        assert others and reaches[others][:, others].sum() == len(others)


def test_the_mask_token_learns_where_it_stands_in_for_something() -> None:
    net = network(fusion=(2, 3))
    kept = torch.arange(4).expand(3, -1)

    def gradient(route: Route) -> Tensor:
        net.zero_grad()
        net(*inputs(net), route=route).square().sum().backward()
        return net.mask_token.grad

    none = torch.tensor([False, False, False])
    assert not gradient(Route(dropped=none)).any()
    assert gradient(Route(kept=kept, dropped=none)).any()
    assert gradient(Route(dropped=~none)).any()
    assert not net.blocks[1].attn.qkv.weight.grad.any()  # all of them were dropped
    assert net.blocks[0].attn.qkv.weight.grad.any() and net.blocks[3].attn.qkv.weight.grad.any()


# -- the model with fusion ------------------------------------------------------------------------


def test_fusion_adds_three_parameters_and_changes_no_other_and_nothing_at_first() -> None:
    torch.manual_seed(5)
    dense = SiT(**SIZE)
    torch.manual_seed(5)
    fused = SiT(**SIZE, fusion=(2, 3))
    before, after = dense.state_dict(), fused.state_dict()
    assert after.keys() - before.keys() == {"fusion.weight", "fusion.bias", "mask_token"}
    assert all(torch.equal(before[key], after[key]) for key in before)
    for net in (dense, fused):  # a new final layer gives zeros
        torch.nn.init.normal_(net.final_layer.linear.weight, generator=torch.manual_seed(6))
    out = dense(*inputs(dense))
    assert torch.equal(fused(*inputs(fused)), out) and out.any()


def test_a_dropped_path_does_not_run_and_is_that_of_all_images() -> None:
    net = network(fusion=(2, 3))
    ran: list[int] = []
    for depth, block in enumerate(net.blocks, start=1):
        block.register_forward_hook(lambda *_, depth=depth: ran.append(depth))
    without = net(*inputs(net), route=Route(dropped=True))
    assert ran == [1, 4]
    each = net(*inputs(net), route=Route(dropped=torch.ones(3, dtype=torch.bool)))
    assert torch.equal(without, each)


def test_warm_up_leaves_the_fusion_alone() -> None:
    net = network(fusion=(2, 3))
    modules = torch.nn.ModuleList(net.warmup_modules(2))
    names = {
        name for name, p in net.named_parameters() if any(p is q for q in modules.parameters())
    }
    assert not {"fusion.weight", "fusion.bias", "mask_token"} & names
    assert "blocks.1.attn.qkv.weight" in names and "blocks.2.attn.qkv.weight" not in names


def test_in_low_precision_the_tokens_stay_in_float32() -> None:
    net = network(fusion=(2, 3), **LIGHTNING)
    kept = choose(torch.rand(3, T), 0.25, "grid")
    with torch.autocast("cpu", torch.bfloat16):
        hidden = net(*inputs(net), tap=(3, 4), route=Route(kept=kept)).hidden
    assert hidden[3].dtype == hidden[4].dtype == torch.float32


# -- settings -------------------------------------------------------------------------------------

SPRINT = Routing("sprint", (2, 3), 0.25, "grid", until=8, path_drop=0.1)
MODEL = Model(depth=4, width=32, heads=2, fusion=(2, 3))


def sprint_run(**changes: Any) -> Run:
    return Run(**{"model": MODEL, "plan": Plan(align=(), routing=SPRINT)} | changes)


def test_a_phase_says_what_is_routed() -> None:
    plan = Plan(warmup=3, depth=1, routing=SPRINT)
    assert plan(2).routing is None and plan(2).path_drop is None  # warm-up
    assert [plan(step).routing for step in (3, 7, 8)] == [SPRINT, SPRINT, None]
    assert [plan(step).path_drop for step in (3, 7, 8)] == [0.1] * 3
    assert plan.segments(20) == ((0, 3), (3, 8), (8, 20))
    tread = Plan(routing=Routing("tread", (2, 3)))
    assert tread(10**9).routing == tread.routing and tread(0).path_drop is None
    never = Plan(routing=dataclasses.replace(SPRINT, until=0))
    assert never(0).routing is None and never(0).path_drop == 0.1
    assert Plan()(0).routing is None and Plan()(0).path_drop is None
    assert Plan().segments(20) == ((0, 20),)


def test_settings_go_through_json_and_old_ones_have_none() -> None:
    run = sprint_run()
    values = to_dict(run)
    assert from_dict(Run, values) == run
    old = to_dict(Run())
    del old["plan"]["routing"], old["model"]["fusion"], old["sample"]["guide"]
    assert from_dict(Run, old) == Run()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": Plan(align=(), routing=Routing("tread", (3, 5)))}, "blocks (3, 5), expected two"),
        ({"plan": Plan(align=(), routing=Routing("tread", (3, 2)))}, "blocks (3, 2), expected two"),
        ({"plan": Plan(align=(), routing=Routing(keep=0.3))}, "kind none: leave out"),
        ({"plan": Plan(align=(), routing=SPRINT)}, "model.fusion is (), plan.routing needs (2, 3)"),
        ({"model": MODEL}, "model.fusion is (2, 3), plan.routing needs ()"),
        (
            {"plan": Plan(align=(), routing=Routing("tread", (2, 3), path_drop=0.1))},
            "path_drop is for kind sprint",
        ),
        (
            {"plan": Plan(align=(), routing=Routing("tread", (2, 3), 0.5, "grid"))},
            "keep 0.5, with choose grid it is 0.25",
        ),
        ({"sample": Sample(guide="path")}, "sample.guide path needs plan.routing.path_drop"),
        (
            {
                "model": Model(net="rdm", depth=4, width=32),
                "flow": Flow(prediction="x"),
                "plan": Plan(align=(), routing=Routing("tread", (2, 3))),
            },
            "plan.routing is for model.net sit, not rdm",
        ),
        (
            {"model": MODEL, "plan": Plan(warmup=2, depth=3, routing=SPRINT, align=repa(2).align)},
            "plan.depth 3 reaches the fusion of sprint after block 3",
        ),
        (
            {
                "model": dataclasses.replace(MODEL, input_size=6),
                "plan": Plan(align=(), routing=SPRINT),
            },
            "cannot keep 0.25 of 3 x 3 patches by grid",
        ),
        (
            {
                "model": dataclasses.replace(MODEL, input_size=4, fusion=()),
                "plan": Plan(align=(), routing=Routing("tread", (2, 3), 0.9)),
            },
            "cannot keep 0.9 of 2 x 2 patches by uniform",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    small = Model(depth=4, width=32, heads=2)
    with pytest.raises(ConfigError) as error:
        Run(**{"model": small, "plan": Plan(align=())} | changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_to_keep_all_or_none_is_out_of_range() -> None:
    for keep in (0.0, 1.0):
        with pytest.raises(ConfigError, match=r"plan.routing.keep is .* expected a number in"):
            Routing("tread", keep=keep)


def test_warm_up_may_end_within_the_routed_blocks() -> None:
    run = sprint_run(plan=Plan(warmup=2, depth=2, align=(Align(block=2),), routing=SPRINT))
    assert run.phase(1).stop_at == 2 and run.phase(2).routing == SPRINT


@pytest.mark.parametrize("name", [n for n in names() if n.endswith(("_tread", "_sprint"))])
def test_recipes_and_their_tiny_twins_route_blocks_between_others_and_end_dense(name: str) -> None:
    for run in (recipe(name), tiny(recipe(name))):
        phases = [run.phase(step) for step in (0, run.steps - 1)]
        assert phases[0].routing == run.plan.routing and phases[1].routing is None
        first, last = run.plan.routing.blocks
        assert 1 < first < last < run.model.depth
        assert bool(run.model.fusion) == (phases[1].path_drop == 0.1) == name.endswith("sprint")
