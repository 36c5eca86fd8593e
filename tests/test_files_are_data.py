"""Whatever a stranger puts into a file is data: nothing of it is run, and nothing is read or written elsewhere."""

import json
import os
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lit_edm.callbacks.picture_info import picture_info
from lit_edm.callbacks.sheet import contact_sheet
from lit_edm.data.folder import find_captioned_images
from lit_edm.data.images import ImageFile, read_mask
from lit_edm.data.rendered import TOLD_IN, check_rendered
from lit_edm.errors import InputError
from lit_edm.modules.convert import convert
from lit_edm.sdxl import SDXLCheckpoint
from lit_edm.sdxl.formats import read_adapter, write_merged
from lit_edm.sdxl.markdown import as_cell, as_code
from lit_edm.sdxl.updates import AdapterWeights

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What code of a stranger's would make; it must not be there after the test."""
    path = tmp_path / "marked"
    yield path
    assert not path.exists(), "a stranger's code was run"


@pytest.fixture
def module(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module whose import leaves the mark."""
    (tmp_path / "stranger.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "stranger"
    sys.modules.pop("stranger", None)


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))


def change(path: Path, **values: Any) -> None:
    """Changes values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def png(path: Path, *chunks: tuple[bytes, bytes]) -> ImageFile:
    """Writes a PNG of one pixel with more chunks in front of it."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), *chunks, (b"IDAT", zlib.compress(bytes(4))))
    framed = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in (*parts, (b"IEND", b""))
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    return ImageFile(path)


class TestBases:
    @pytest.mark.parametrize(("part", "name"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
    def test_pickles_are_no_weights(self, base: Path, mark: Path, part: str, name: str) -> None:
        pickle = base / part / ("pytorch_model.bin" if name == "model" else f"{name}.bin")
        torch.save({"x": Evil(mark)}, pickle)
        checkpoint = SDXLCheckpoint(str(base))
        load: Callable[..., Any] = getattr(checkpoint, "load_unet" if part == "unet" else "load_text_encoders")
        load(torch.float32)  # beside safetensors they are not looked at
        (base / part / f"{name}.safetensors").unlink()
        for use in (checkpoint.check_files, lambda: load(torch.float32)):
            with pytest.raises(InputError, match=rf"holds .*{pickle.name}, but no {name}\.safetensors"):
                use()

    def test_configs_name_no_code(self, base: Path, module: str, tmp_path: Path) -> None:
        """Neither as transformers' auto_map, nor as diffusers' custom components, of which a pipeline is made."""
        for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
            shutil.copy(tmp_path / f"{module}.py", base / part)
            (config,) = [p for p in (base / part).glob("*config.json") if p.name != "generation_config.json"]
            change(config, auto_map={"AutoModel": f"{module}.Net", "AutoConfig": f"{module}.Net"}, custom=module)
        shutil.copy(tmp_path / f"{module}.py", base)
        change(base / "model_index.json", _class_name=[module, "Pipe"], unet=[module, "Net"], vae=[module, "Net"])
        write_merged(SDXLCheckpoint(str(base)), AdapterWeights({}), tmp_path / "merged")
        assert (tmp_path / "merged/model_index.json").is_file()

    @pytest.mark.parametrize("name", ["stranger", "UNet2DModel", "DiffusionPipeline", None, 5, ["os", "system"]])
    def test_a_scheduler_is_one_of_diffusers(self, base: Path, module: str, name: Any) -> None:
        change(base / "scheduler/scheduler_config.json", _class_name=name)
        with pytest.raises(InputError, match=r"_class_name is .*, which is not supported"):
            SDXLCheckpoint(str(base)).load_scheduler()

    @pytest.mark.parametrize(
        "text", ["{", "[]", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
    )
    def test_configs_that_are_none(self, base: Path, text: str) -> None:
        (base / "scheduler/scheduler_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"cannot read scheduler/scheduler_config\.json"):
            SDXLCheckpoint(str(base)).preconditioning()


class TestAdapters:
    @pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors"])
    def test_pickles_are_not_loaded(self, tmp_path: Path, mark: Path, name: str) -> None:
        torch.save({"x": Evil(mark)}, tmp_path / name)
        with pytest.raises(InputError, match=r"could run code|no safetensors file"):
            read_adapter(tmp_path / name)

    def test_a_pickle_beside_is_not_looked_at(self, tmp_path: Path, mark: Path) -> None:
        torch.save({"x": Evil(mark)}, tmp_path / "pytorch_lora_weights.bin")
        with pytest.raises(InputError, match=r"no \.safetensors file"):
            read_adapter(tmp_path)

    @pytest.mark.parametrize("shape", [[10**6, 10**6], [2**62, 4], [2**64, 1]])
    def test_sizes_that_no_memory_has(self, tmp_path: Path, shape: list[int]) -> None:
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
        header = json.dumps({f"{LAYER}.lora_A.weight": tensor}).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(InputError, match="damaged one"):
            read_adapter(tmp_path / "a.safetensors")

    @pytest.mark.parametrize(
        "header",
        [
            {"lora_adapter_metadata": "["},
            {"lora_adapter_metadata": "[" * 100_000},
            {"lora_adapter_metadata": "[1]"},
            {"lora_adapter_metadata": '{"unet.lora_alpha": "1"}'},
            {"lora_adapter_metadata": '{"unet.lora_alpha": 1e400}'},
            {"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'},
            {"lora_adapter_metadata": '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}'},
            {"lora_adapter_metadata": '{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}'},
            {"lit_edm_tokens": '{"TOK": 1000000000000}'},
            {"lit_edm_tokens": '{"TOK": -1}'},
            {"lit_edm_tokens": '{"TOK": "1"}'},
            {"lit_edm_tokens": "[]"},
        ],
    )
    def test_headers_that_make_no_sense(self, tmp_path: Path, header: dict[str, str]) -> None:
        tensors = {"clip_l": torch.zeros(1, 2), "clip_g": torch.zeros(1, 3)}
        save_file(tensors, tmp_path / "a.safetensors", metadata=header)
        with pytest.raises(InputError, match=r"a\.safetensors: its header"):
            read_adapter(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("pattern", ["(a+)+$", "(?:" * 9 + "a" + "){9}" * 9, ".*" * 40 + "x", "(a|a)" * 40])
    def test_no_pattern_takes_for_ever(self, tmp_path: Path, pattern: str) -> None:
        settings = {"unet.lora_alpha": 1, "unet.alpha_pattern": {pattern: 2}}
        factors = {f"{LAYER}.lora_A.weight": torch.zeros(2, 4), f"{LAYER}.lora_B.weight": torch.zeros(4, 2)}
        save_file(factors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
        start = time.monotonic()
        with pytest.raises(InputError, match="alpha_pattern"):
            read_adapter(tmp_path / "a.safetensors")
        assert time.monotonic() - start < 1

    @pytest.mark.parametrize(
        "factors",
        [
            {"lora_down.weight": (), "lora_up.weight": (4, 1)},
            {"lora_down.weight": (0, 4), "lora_up.weight": (4, 0)},
            {"lora_down.weight": (1, 4), "lora_up.weight": (4, 1), "alpha": (3,)},
            {"lora_down.weight": (1, 4), "lora_up.weight": (4,)},
            {"hada_w1_a": (4,), "hada_w1_b": (4,), "hada_w2_a": (4,), "hada_w2_b": (4,)},
            {"lokr_w1": (), "lokr_w2": (4, 4)},
        ],
    )
    def test_factors_that_are_no_matrices(self, tmp_path: Path, factors: dict[str, tuple[int, ...]]) -> None:
        tensors = {f"{LAYER}.{name}": torch.zeros(shape) for name, shape in factors.items()}
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=rf"{LAYER}: .* has the shape"):
            read_adapter(tmp_path / "a.safetensors")


class TestCheckpoints:
    def save(self, checkpoint: Path, **hyper_parameters: Any) -> Path:
        own = {
            "_class_path": "lit_edm.modules.sdxl.SDXLModule",
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            "adapter": None,
            "tokens": {"TOK": 1},
        }
        kept = {"hyper_parameters": own | hyper_parameters, "state_dict": {}, "callbacks": {}, "loops": {}}
        torch.save({**kept, "pytorch-lightning_version": "2.6.6"}, checkpoint)
        return checkpoint

    def test_pickles_are_not_loaded(self, tmp_path: Path, mark: Path) -> None:
        torch.save({"hyper_parameters": Evil(mark)}, tmp_path / "last.ckpt")
        with pytest.raises(InputError, match="damaged, or no checkpoint"):
            convert(tmp_path / "last.ckpt", tmp_path / "out")

    @pytest.mark.parametrize(
        "settings",
        [
            {"_instantiator": "os.mkdir", "path": "MARK"},
            {"_class_path": "stranger.SDXLModule"},
            {"adapter": {"class_path": "stranger.Net"}},
            {"adapter": "stranger.Net"},
            {"text_encoder_adapter": {"class_path": "lit_edm.sdxl.os.mkdir", "init_args": {"path": "MARK"}}},
            {"optimizer": {"class_path": "os.mkdir", "init_args": {"path": "MARK"}}},
            {"lr_scheduler": {"class_path": "os.mkdir", "init_args": {"path": "MARK"}}},
            {"loss": {"class_path": "stranger.Loss"}},
            {"generation": {"sampler": {"class_path": "stranger.Sampler"}}},
        ],
    )
    def test_settings_name_no_code(
        self, tiny: Path, tmp_path: Path, module: str, mark: Path, settings: dict[str, Any]
    ) -> None:
        """Neither is what they name imported, nor is it called; what an export does not need is not looked at."""
        hostile = json.loads(json.dumps(settings).replace("MARK", str(mark)))
        path = self.save(tmp_path / "last.ckpt", pretrained=str(tiny), **hostile)
        with pytest.raises(InputError, match=r"its adapter is|trained with another adapter or other tokens"):
            convert(path, tmp_path / "out")


class TestImages:
    @pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
    def test_compressed_text_stays_small(self, tmp_path: Path, kind: bytes) -> None:
        between = {b"zTXt": b"\0\0", b"iTXt": b"\0\1\0\0\0", b"iCCP": b"\0\0"}[kind]
        image = png(tmp_path / "a.png", (kind, TOLD_IN.encode() + between + zlib.compress(bytes(200_000_000), 9)))
        with pytest.raises(InputError, match="Decompressed data too large"):
            image.check()

    @pytest.mark.parametrize("use", [ImageFile.check, ImageFile.read, ImageFile.size, read_mask])
    def test_programs_are_no_images(self, tmp_path: Path, use: Callable[..., object]) -> None:
        """PostScript, which Pillow would have Ghostscript run, whatever its file is called."""
        (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
        with pytest.raises(InputError, match=r"a\.png cannot be read as an image \(it is none\)"):
            use(ImageFile(tmp_path / "a.png"))

    @pytest.mark.parametrize("told", ["{", "[]", "7", "[" * 10_000, '{"prompt": ["a"]}', '{"size": null}'])
    def test_what_a_picture_says_of_itself(self, tmp_path: Path, told: str) -> None:
        image = png(tmp_path / "class_00000.png", (b"tEXt", f"{TOLD_IN}\0{told}".encode()))
        with pytest.raises(InputError, match=r"was rendered with prompt"):
            check_rendered(image, "a cat", (8, 8))


class TestNamesAndCaptions:
    NAMES = (
        "\"q'.png",
        "a|b.png",
        "<img src=x>.png",
        "-rf.png",
        "new\nline.png",
        "\u202egnp.exe.png",
        "$(id);`id`.png",
    )

    def write(self, folder: Path, *rows: dict[str, str]) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def test_odd_names_are_names(self, tmp_path: Path) -> None:
        folder = tmp_path / "images"
        self.write(folder, *({"file_name": name, "text": name} for name in self.NAMES))
        for name in self.NAMES:
            Image.new("RGB", (4, 4)).save(folder / name, "PNG")
        found = find_captioned_images(folder)
        assert sorted(image.caption for image in found) == sorted(self.NAMES)
        for image in found:
            image.check()

    @pytest.mark.parametrize("column", ["file_name", "mask_file_name"])
    @pytest.mark.parametrize("linked", ["file", "folder"])
    def test_no_row_leads_out_of_its_folder_by_a_link(self, tmp_path: Path, column: str, linked: str) -> None:
        folder, elsewhere = tmp_path / "images", tmp_path / "private"
        elsewhere.mkdir()
        self.write(
            folder, {"file_name": "a.png", "text": "x"} | {column: "link/b.png" if linked == "folder" else "b.png"}
        )
        for path in (folder / "a.png", elsewhere / "b.png"):
            Image.new("RGB", (4, 4)).save(path)
        link, target = (folder / "link", elsewhere) if linked == "folder" else (folder / "b.png", elsewhere / "b.png")
        link.symlink_to(target)
        with pytest.raises(InputError, match=r"line 1: '.*b\.png' is a link that leads out of .*images: put the file"):
            find_captioned_images(folder)

    def test_links_of_the_hubs_cache_are_followed(self, tmp_path: Path) -> None:
        """There every file of a data set is a link to a folder beside, the table too."""
        snapshot, blobs = tmp_path / "snapshots/0", tmp_path / "blobs"
        for folder in (snapshot / "deep", blobs):
            folder.mkdir(parents=True)
        self.write(snapshot, {"file_name": "deep/a.png", "text": "x"})
        Image.new("RGB", (4, 4)).save(snapshot / "deep/a.png")
        for number, path in enumerate([snapshot / "metadata.jsonl", snapshot / "deep/a.png"]):
            path.rename(blobs / str(number))
            path.symlink_to(blobs / str(number))
        (image,) = find_captioned_images(snapshot)
        image.check()
        assert image.caption == "x"

    @pytest.mark.parametrize("name", ["a\0.png", "x" * 5000 + ".png", "a/" * 3000 + "b.png", "C:\\b.png", "/dev/zero"])
    def test_names_that_no_file_has(self, tmp_path: Path, name: str) -> None:
        for row in ({"file_name": name}, {"file_name": "a.png", "mask_file_name": name}):
            self.write(tmp_path / "images", {"text": "x", **row})
            Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")
            with pytest.raises(InputError, match="line 1: "):
                find_captioned_images(tmp_path / "images")

    @pytest.mark.parametrize(
        "line", ['{"file_name": "a.png", "text": "\\ud800"}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
    )
    def test_lines_that_are_no_rows(self, tmp_path: Path, line: str) -> None:
        self.write(tmp_path / "images")
        (tmp_path / "images/metadata.jsonl").write_text(line)
        Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")
        with pytest.raises(InputError, match="line 1: "):
            find_captioned_images(tmp_path / "images")

    @pytest.mark.parametrize(
        "caption", ["long " * 20_000, "x" * 100_000, "\x1b[2J\x1b]0;title\x07", "\u202eabc", "a\0b\n" * 99]
    )
    def test_sheets_stay_small(self, caption: str) -> None:
        sheet = contact_sheet({caption[:9]: [Image.new("RGB", (4, 4))]}, [caption], side=64)
        assert sheet.height < 400

    def test_cards_show_no_marks_of_direction_and_no_codes_of_terminals(self) -> None:
        text = "a \x1b[31mred\x07 \u202eelppa\u2066 \x85 b"
        for shown in (as_cell(text), as_code(text)):
            assert all(letter.isprintable() for letter in shown)
            assert "red" in shown

    def test_what_a_picture_says_is_text(self, tmp_path: Path) -> None:
        """Whatever a prompt is, it stands in its own place, and the picture can be read again."""
        settings = {"steps": 1, "sampler": "x", "guidance_scale": 1.0, "pretrained": "base\n, Seed: 5", "adapters": []}
        settings |= {"guidance_interval": None, "negative_prompt": None}
        for prompt in ("a\x1b[2J", "\u202eb", "c\0d", "x" * 100_000, '"}]\\', "雪"):
            request: Any = {"index": 0, "prompt": prompt, "size": (8, 8), "seed": 0, "scale": 1.0}
            Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=picture_info(request, settings))
            with Image.open(tmp_path / "a.png") as written:
                assert json.loads(written.text["lit_edm"])["prompt"] == prompt  # type: ignore[attr-defined]
