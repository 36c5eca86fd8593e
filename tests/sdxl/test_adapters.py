from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lit_edm.errors import InputError
from lit_edm.sdxl import Adapter, DoRA, FullFinetune, LoCon, LoHa, LoKr, LoRA, SDXLCheckpoint
from lit_edm.sdxl.adapters import initial_state
from lit_edm.sdxl.conditioning import without_gradient
from lit_edm.sdxl.low_rank import updated_layers
from lit_edm.sdxl.outlines import unet

LOW_RANK: dict[str, Any] = {
    "lora": LoRA(rank=3, alpha=6.0),
    "rslora": LoRA(rank=4, rank_stabilized=True),
    "gaussian": LoRA(init="gaussian"),
    "orthogonal": LoRA(rank=4, init="orthogonal"),
    "pissa": LoRA(rank=3, init="pissa", alpha=1.0),
    "pissa_niter_4": LoRA(rank=3, init="pissa_niter_4"),
    "olora": LoRA(rank=3, init="olora", rank_stabilized=True),
    "dora": DoRA(rank=3),
    "orthogonal_dora": DoRA(rank=4, init="orthogonal"),
    "locon": LoCon(conv_rank=3, conv_alpha=1.0),
    "loha": LoHa(rank=2),
    "lokr": LoKr(rank=2, factor=4),
}
ADAPTERS = LOW_RANK | {"full": FullFinetune()}


def load(base: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The UNet or a text encoder of the tiny base, frozen, in training mode as Lightning has it."""
    checkpoint = SDXLCheckpoint(str(base))
    if kind == "unet":
        return checkpoint.load_unet(dtype).train()
    return checkpoint.load_text_encoders(dtype)[kind == "text_encoder_2"].train()


def run(network: Any, seed: int = 0) -> Tensor:
    """What a network makes of some input, float32."""
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(network, UNet2DConditionModel):
        ids = torch.randint(0, 500, (2, 77), generator=generator)
        return network(ids, output_hidden_states=True)[0].float()
    dtype = network.conv_in.weight.dtype
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 80, generator=generator)
    pooled, sizes = torch.randn(1, 48, generator=generator), torch.randn(1, 6, generator=generator)
    added = {"text_embeds": pooled.to(dtype), "time_ids": sizes}
    return network(x.to(dtype), torch.tensor([7.0]), context.to(dtype), added_cond_kwargs=added).sample.float()


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def move(network: nn.Module, seed: int = 0) -> None:
    """Changes all that is trained, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(network).values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_the_real_sdxl_takes_the_adapter(sdxl_unet: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl_unet).requires_grad_(False)
        base = sum(parameter.numel() for parameter in unet.parameters())
        LoRA(rank=8)(unet)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    # By hand. Transformer blocks of width 640: 2 x 2 down, 3 x 2 up; of 1280: 2 x 10 down, 10 in the middle, 3 x 10 up.
    blocks = {640: 2 * 2 + 3 * 2, 1280: 2 * 10 + 10 + 3 * 10}
    # Each has self-attention, 4 layers d -> d, and cross-attention, 2 layers d -> d and 2 layers 2048 -> d.
    rank, layers = 8, 8
    by_hand = {d: rank * (6 * (d + d) + 2 * (2048 + d)) for d in blocks}
    assert base == 2_567_463_684
    assert len(trained) == 2 * layers * sum(blocks.values()) == 1120
    assert sum(p.numel() for p in trained) == sum(n * by_hand[d] for d, n in blocks.items()) == 11_612_160


def test_the_real_sdxl_takes_ranks_by_layer_and_block(sdxl_unet: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl_unet).requires_grad_(False)
        LoCon(rank=8, conv_rank=4, ranks={"*.attn2": 16, "mid_block": 2})(unet)
    counts = Counter(layer.r["default"] for layer in updated_layers(unet).values())
    # By hand. 70 transformer blocks in 11 stacks, 10 of them in one in the middle.
    attention, feed_forward, projections = 8 * 70, 2 * 70, 2 * 11
    # 17 residual blocks, 2 of them in the middle; a shortcut where the width changes; twice down, twice up.
    convolutions = 2 * 17 + 11 + 4
    middle = 10 * (8 + 2) + 2 + 2 * 2
    cross = 4 * 60
    assert counts == {
        2: middle,
        16: cross,
        4: convolutions - 2 * 2,
        8: attention + feed_forward + projections - cross - (middle - 2 * 2),
    }


def test_the_real_sdxl_has_the_blocks_of_b_lora(sdxl_unet: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl_unet).requires_grad_(False)
        LoRA(blocks=("content", "style"))(unet)
    layers = updated_layers(unet)
    blocks = {".".join(name.split(".")[:4]) for name in layers}
    assert blocks == {"up_blocks.0.attentions.0", "up_blocks.0.attentions.1"}
    assert len(layers) == 2 * 10 * 8


@pytest.mark.parametrize("kind", ["unet", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("adapter", LOW_RANK.values(), ids=LOW_RANK)
def test_starts_as_the_base_and_comes_back_to_it(tiny: Path, adapter: Adapter, kind: str) -> None:
    network = load(tiny, kind)
    base = run(network)
    adapter(network)
    torch.testing.assert_close(run(network), base, rtol=1e-4, atol=1e-5)
    move(network)
    assert (run(network) - base).abs().max() > 1e-3
    with adapter.disabled(network):
        assert run(network).equal(base)
        with adapter.disabled(network):
            assert run(network).equal(base)
        assert run(network).equal(base)
    assert (run(network) - base).abs().max() > 1e-3


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_trains_in_float32_over_a_half_precision_base(tiny: Path, adapter: Adapter) -> None:
    for kind in ("unet", "text_encoder_2"):
        network = load(tiny, kind, torch.bfloat16)
        frozen = {name: parameter.clone() for name, parameter in network.named_parameters()}
        adapter(network)
        assert {parameter.dtype for parameter in trained(network).values()} == {torch.float32}
        before = {name: parameter.detach().clone() for name, parameter in trained(network).items()}
        optimizer = torch.optim.SGD(trained(network).values(), lr=1.0)
        for _ in range(2):  # in the first step one of the factors is 0, and so is the other's gradient
            with torch.autocast("cpu", torch.bfloat16):
                loss = run(network).square().sum()
            loss.backward()
            optimizer.step()
        assert all((parameter != before[name]).any() for name, parameter in trained(network).items())
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                assert parameter.equal(frozen[name.replace(".base_layer", "")])


def test_half_precision_comes_back_to_the_base_too(tiny: Path) -> None:
    for name, adapter in LOW_RANK.items():
        network = load(tiny, "unet", torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            base = run(network)
        adapter(network)
        move(network)
        with torch.autocast("cpu", torch.bfloat16), adapter.disabled(network):
            assert run(network).equal(base), name


@pytest.mark.parametrize("adapter", [LoRA(), DoRA(), LoHa(), LoRA(init="pissa", rank=3)], ids=str)
def test_disabled_leaves_everything_as_it_was_also_after_an_error(tiny: Path, adapter: Adapter) -> None:
    unet = load(tiny, "unet")
    adapter(unet)
    next(iter(trained(unet).values())).requires_grad_(False)  # as a user may
    unet.mid_block.eval()
    move(unet)
    flags = [(name, parameter.requires_grad) for name, parameter in unet.named_parameters()]
    modes = [module.training for module in unet.modules()]
    output = run(unet)
    with pytest.raises(KeyError), adapter.disabled(unet):
        raise KeyError
    assert [(name, parameter.requires_grad) for name, parameter in unet.named_parameters()] == flags
    assert [module.training for module in unet.modules()] == modes
    assert run(unet).equal(output)


@pytest.mark.parametrize("adapter", [DoRA, LoHa, LoKr])
def test_convolutions_have_updates_where_they_are_named(tiny: Path, adapter: type[DoRA]) -> None:
    unet = load(tiny, "unet")
    base = run(unet)
    adapter(rank=3, target_modules=("conv1", "ff.net.2"))(unet)
    torch.testing.assert_close(run(unet), base, rtol=1e-4, atol=1e-5)
    move(unet)
    assert (run(unet) - base).abs().max() > 1e-3
    assert {type(layer.get_base_layer()) for layer in updated_layers(unet).values()} == {nn.Linear, nn.Conv2d}


def test_a_teacher_does_not_cut_the_graph_of_its_student(tiny: Path) -> None:
    adapter = LoRA()
    gradients = []
    for teach in (False, True):
        torch.manual_seed(0)
        unet = load(tiny, "unet")
        adapter(unet)
        move(unet)
        output = run(unet)
        if teach:
            with adapter.disabled(unet), torch.no_grad():
                run(unet)
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in trained(unet).values()])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


class TestWithout:
    @pytest.mark.parametrize("adapter", [LoRA(), FullFinetune(), LoKr()], ids=str)
    def test_leaves_layers_out(self, tiny: Path, adapter: Adapter) -> None:
        for kind in ("text_encoder", "text_encoder_2"):
            encoder = load(tiny, kind)
            adapter(encoder, without=("encoder.layers.1", "final_layer_norm"))
            names = trained(encoder)
            assert names
            assert not any("layers.1." in name or "final_layer_norm" in name for name in names)

    def test_may_leave_nothing(self, tiny: Path) -> None:
        encoder = load(tiny, "text_encoder")
        LoRA(blocks=("encoder.layers.1",), init="pissa")(encoder, without=("encoder.layers.1",))
        assert not trained(encoder)


class TestSizes:
    @pytest.mark.parametrize(
        ("settings", "scale"),
        [({}, 1.0), ({"alpha": 2.0}, 0.5), ({"alpha": 2.0, "rank_stabilized": True}, 1.0)],
    )
    def test_alpha_scales_the_update(self, tiny: Path, settings: dict[str, Any], scale: float) -> None:
        unet = load(tiny, "unet")
        LoRA(rank=4, target_modules=("to_q",), **settings)(unet)
        layers = updated_layers(unet).values()
        assert {layer.scaling["default"] for layer in layers} == {scale}
        assert {layer.lora_A["default"].weight.shape[0] for layer in layers} == {4}

    @pytest.mark.parametrize("adapter", [LoRA, LoHa])
    def test_by_pattern_and_the_last_counts(self, tiny: Path, adapter: type[LoRA]) -> None:
        unet = load(tiny, "unet")
        adapter(ranks={"*.attn1": 2, "mid_block": 5}, alphas={"up_blocks": 1.0}, blocks=("mid_block", "up_blocks.0"))(
            unet
        )
        for name, layer in updated_layers(unet).items():
            rank = 5 if name.startswith("mid_block") else 2 if "attn1" in name else 8
            assert name.startswith(("mid_block", "up_blocks.0"))
            assert layer.r["default"] == rank
            assert layer.scaling["default"] == (1 / rank if name.startswith("up_blocks") else 1)

    def test_convolutions_have_their_own(self, tiny: Path) -> None:
        unet = load(tiny, "unet")
        LoCon(rank=4, alpha=2.0, conv_rank=3, conv_alpha=6.0)(unet)
        sizes = {type(layer.get_base_layer()): set() for layer in updated_layers(unet).values()}
        for layer in updated_layers(unet).values():
            sizes[type(layer.get_base_layer())].add((layer.r["default"], layer.scaling["default"]))
        assert sizes == {nn.Linear: {(4, 0.5)}, nn.Conv2d: {(3, 2.0)}}

    def test_text_encoders_have_layers_of_other_names(self, tiny: Path) -> None:
        for adapter, ends in ((LoRA(), 4), (LoCon(), 6)):
            encoder = load(tiny, "text_encoder")
            adapter(encoder)
            assert len(updated_layers(encoder)) == 2 * ends


def test_dropout_drops_in_training_alone(tiny: Path) -> None:
    for adapter in (LoRA(dropout=0.5), DoRA(dropout=0.5), LoCon(dropout=0.5), LoHa(dropout=0.5), LoKr(dropout=0.5)):
        unet = load(tiny, "unet")
        adapter(unet)
        move(unet)
        assert not run(unet).equal(run(unet))
        unet.eval()
        assert run(unet).equal(run(unet))


class TestFullFinetune:
    def test_trains_all_but_embedding_tables(self, tiny: Path) -> None:
        unet, encoder = load(tiny, "unet"), load(tiny, "text_encoder")
        for network in (unet, encoder):
            FullFinetune()(network)
        assert all(parameter.requires_grad for parameter in unet.parameters())
        frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
        assert frozen == {"embeddings.token_embedding.weight", "embeddings.position_embedding.weight"}

    @pytest.mark.parametrize("block", ["mid_block", "*.norm1", "*.attentions.*.norm", "conv_in", "time_embedding"])
    def test_trains_some_blocks_of_a_half_precision_base(self, tiny: Path, block: str) -> None:
        unet = load(tiny, "unet", torch.bfloat16)
        FullFinetune((block,))(unet)
        with torch.autocast("cpu", torch.bfloat16):
            run(unet).sum().backward()
        assert all(parameter.grad is not None for parameter in trained(unet).values())
        assert 0 < len(trained(unet)) < len(list(unet.parameters()))

    def test_trains_a_half_precision_text_encoder_up_to_what_is_used(self, tiny: Path) -> None:
        """What comes after it stays frozen, and still has to take what comes out in float32."""
        encoder = load(tiny, "text_encoder", torch.bfloat16)
        unused = without_gradient(encoder, 0)
        FullFinetune(embeddings=True)(encoder, unused)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = encoder(torch.ones(1, 77, dtype=torch.int64), output_hidden_states=True).hidden_states[-2]
        hidden.float().square().sum().backward()
        assert all(parameter.grad is not None for parameter in trained(encoder).values())
        frozen = encoder.state_dict().keys() - trained(encoder).keys()
        assert frozen
        assert all(any(name.startswith(part) for part in unused) for name in frozen)

    def test_keeps_no_base(self, tiny: Path) -> None:
        unet = load(tiny, "unet")
        FullFinetune()(unet)
        with pytest.raises(InputError, match=r"^model.init_args.adapter is FullFinetune, .* class images"):
            FullFinetune().disabled(unet)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_checkpoint_brings_back_what_the_update_started_from(tiny: Path, init: Any) -> None:
    adapter = LoRA(rank=3, alpha=2.0, init=init)
    unet = load(tiny, "unet")
    adapter(unet)
    start = initial_state(unet)
    assert start.keys() == {f"{n}.initial.{key}" for n in updated_layers(unet) for key in "ab"}
    move(unet)
    keep = trained(unet).keys() | start.keys()
    checkpoint = {name: value.clone() for name, value in unet.state_dict().items() if name in keep}

    resumed = load(tiny, "unet")
    adapter(resumed)
    for buffer in initial_state(resumed).values():  # another library finds vectors of another sign and order
        buffer.mul_(-0.5)
    assert not resumed.load_state_dict(checkpoint, strict=False).unexpected_keys
    assert run(resumed).equal(run(unet))
    assert not initial_state(load(tiny, "unet"))


class TestBadSettings:
    @pytest.mark.parametrize(
        ("adapter", "settings", "message"),
        [
            (LoRA, {"rank": 0}, r"^LoRA.rank must be 1 or more, got 0$"),
            (LoRA, {"alpha": -1.0}, r"^LoRA.alpha must be positive, got -1.0$"),
            (DoRA, {"alphas": {"mid_block": 0.0}}, r"^DoRA.alphas must be positive for each pattern"),
            (LoHa, {"ranks": {"mid_block": 0}}, r"^LoHa.ranks must be 1 or more for each pattern"),
            (LoKr, {"dropout": 1.0}, r"^LoKr.dropout must be in \[0, 1\), got 1.0$"),
            (LoKr, {"factor": 0}, r"^LoKr.factor must be"),
            (LoCon, {"conv_rank": 0}, r"^LoCon.conv_rank must be 1 or more"),
            (DoRA, {"init": "pissa"}, r"^DoRA.init must be default, gaussian or orthogonal, got 'pissa'$"),
        ],
    )
    def test_by_themselves(self, adapter: Any, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            adapter(**settings)

    @pytest.mark.parametrize(
        ("adapter", "message"),
        [
            (LoRA(target_modules=("to_q", "to_x")), r"target_modules: no linear layer or convolution is called to_x$"),
            (LoRA(target_modules=("norm1",)), r"target_modules: no linear layer or convolution is called norm1$"),
            (LoRA(blocks=("up_blocks.7",)), r"blocks: up_blocks.7 is no layer"),
            (LoRA(blocks=("mid_block",), ranks={"up_blocks.0": 2}), r"ranks: up_blocks.0 is no layer"),
            (LoHa(alphas={"conv_in": 2}), r"alphas: conv_in is no layer"),
            (FullFinetune(("nowhere",)), r"blocks: nowhere is no layer"),
            (LoRA(init="pissa", target_modules=("conv1",)), r"init is pissa, but .*conv1 is a convolution"),
            (LoRA(init="olora", rank=33), r"init is olora, but .* has rank 33, more than .* write 32 or less"),
            (LoRA(init="orthogonal", ranks={"mid_block": 3}), r"init is orthogonal, .* but mid_block.* has rank 3"),
        ],
    )
    def test_for_a_network(self, tiny: Path, adapter: Adapter, message: str) -> None:
        with pytest.raises(InputError, match=r"^model.init_args.adapter.init_args." + message):
            adapter(load(tiny, "unet"))
        with pytest.raises(InputError, match=r"^model.init_args.adapter.init_args." + message):
            adapter.check(unet(SDXLCheckpoint(str(tiny))))

    def test_name_the_text_encoders_by_their_key(self, tiny: Path) -> None:
        with pytest.raises(InputError, match=r"^model.init_args.text_encoder_adapter.init_args.blocks: mid_block"):
            LoRA(blocks=("mid_block",))(load(tiny, "text_encoder"))


@pytest.mark.parametrize("kind", ["unet", "text_encoder", "text_encoder_2"])
def test_a_base_that_has_learned_nothing_is_trained_whole(tiny: Path, kind: str) -> None:
    whole, known = load(tiny, kind), load(tiny, kind)
    FullFinetune(embeddings=True)(whole)
    FullFinetune()(known)
    tables = {name for name, _ in whole.named_parameters() if "embedding.weight" in name and "time" not in name}
    assert bool(tables) == (kind != "unet")
    assert trained(whole).keys() == dict(whole.named_parameters()).keys()
    assert trained(known).keys() == trained(whole).keys() - tables
