"""What users get wrong, as data: how it comes about, and the command that meets it.

scripts/bad_inputs_table.py runs the commands, each in a new folder with two captioned images and a tiny base, and
writes what they say to docs/bad_inputs.md.
"""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

ROW = {"file_name": "a.png", "text": "TOK in red"}
TABLE, PICTURE, CONFIG = "images/metadata.jsonl", "images/b.png", "config.yaml"
LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
UNET = "base/unet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Case:
    """Something that cannot work.

    Args:
        input: What the user did, Markdown.
        make: Makes the files, in the current folder; none if not given.
        settings: Arguments of the command line, parted by blanks.
        command: What is run: fit and predict with a config that works but for these settings, lit-edm, export or merge.
        late: Whether it is known only once weights are loaded.
    """

    input: str
    make: Callable[[], object] | None = None
    settings: str = ""
    command: str = "fit"
    late: bool = False


def writes(path: str, contents: str | bytes) -> Callable[[], object]:
    """Writes a file, text as UTF-8."""
    data = contents if isinstance(contents, bytes) else contents.encode()
    return lambda: Path(path).write_bytes(data)


def rows(*written: dict[str, Any] | str) -> Callable[[], object]:
    """Writes a metadata.jsonl of these rows, and removes the second image if it is in none of them."""
    lines = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in written)
    return lambda: (Path(TABLE).write_text(lines, encoding="utf-8"), "b.png" in lines or Path(PICTURE).unlink())


def instead_of_table(path: str, contents: str | bytes) -> Callable[[], object]:
    """Writes a file in place of metadata.jsonl, and leaves the first image alone."""
    return lambda: (Path(PICTURE).unlink(), Path(TABLE).unlink(), writes(path, contents)())


def mask(path: str, width: int = 32) -> Callable[[], object]:
    """Writes a mask."""
    return lambda: Image.new("L", (width, 32)).save(path)


def changed(old: str, new: str, path: str = CONFIG) -> Callable[[], object]:
    """Replaces some text of a file."""
    return lambda: Path(path).write_text(Path(path).read_text().replace(old, new))


def renamed(suffix: str) -> None:
    """Gives all images another suffix."""
    for image in Path("images").glob("*.png"):
        image.rename(image.with_suffix(suffix))


def cut(path: str) -> Callable[[], object]:
    """Cuts a file in its middle."""
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[: Path(path).stat().st_size // 2])


def bomb(path: str) -> Callable[[], object]:
    """Writes a PNG of a hundred bytes that says it is 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))
    return writes(path, b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks))


def chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def link_out_of_the_folder() -> None:
    """Replaces an image by a link to one elsewhere."""
    Path(PICTURE).rename("b.png")
    Path(PICTURE).symlink_to("../b.png")


def tensors(path: str, **named: tuple[int, ...]) -> Callable[[], object]:
    """Writes zeros of these shapes."""
    return lambda: save_file({name: torch.zeros(shape) for name, shape in named.items()}, path)


def adapter(width: int = 32, **header: str) -> Callable[[], object]:
    """Writes a LoRA of one layer, which is 32 wide in the tiny base."""
    factors = {f"{LAYER}.lora_A.weight": torch.zeros(2, width), f"{LAYER}.lora_B.weight": torch.zeros(width, 2)}
    return lambda: save_file(factors, "a.safetensors", metadata=header)


def in_config(path: str, **changed: Any) -> Callable[[], object]:
    """Changes values of a JSON file."""
    return lambda: Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changed))


def without(*paths: str) -> Callable[[], object]:
    """Removes files and folders."""
    return lambda: [shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink() for path in paths]


def pickled(path: str, in_place_of: str | None = None) -> Callable[[], object]:
    """Writes tensors as torch.save does, in place of another file."""
    return lambda: (torch.save({"x": torch.zeros(1)}, path), in_place_of and Path(in_place_of).unlink())


ADAPTERS = '--model.generation.adapters=[{"path":"a.safetensors"}]'
EMBEDDINGS = "--model.embeddings=e.safetensors"
FROM_FILE = "--model.adapter=FromFile --model.adapter.path=a.safetensors"
LOSS = "--model.loss=EDMLoss --model.loss.weighting=SNRWeighting"

CASES = {
    "Images": [
        Case("The folder does not exist", settings="--data.root=nowhere"),
        Case("The folder is empty", lambda: Path("empty").mkdir(), "--data.root=empty"),
        Case("An image is named in place of its folder", settings="--data.root=images/a.png"),
        Case("All pictures are HEIC", lambda: renamed(".heic")),
        Case("No folder and no data set is named", settings="--data.root=null"),
        Case("A folder and a data set are named", settings="--data.dataset=someone/pictures"),
        Case(
            "The data set is not on this computer, and there is no network", None, "--data.root=null --data.dataset=a/b"
        ),
        Case("An image is cut off", cut(PICTURE)),
        Case("An image has no bytes", writes(PICTURE, b"")),
        Case(
            "An image is a web page, as a failed download leaves it", writes(PICTURE, "<!DOCTYPE html><html>404</html>")
        ),
        Case("A PNG of a hundred bytes that says it is 30,000 x 30,000 pixels", bomb(PICTURE)),
        Case("A mask like that", bomb("images/b.mask.png")),
        Case("A mask is smaller than its image", mask("images/b.mask.png", 16)),
        Case("A mask has no image", mask("images/c.mask.png")),
        Case("Held-out images are trained on", settings="--data.val_root=images"),
        Case("The folder of held-out images does not exist", settings="--data.val_root=nowhere"),
    ],
    "Captions": [
        Case("There are no captions", without(TABLE)),
        Case("A row is not JSON", rows(ROW, '{"file_name": "b.png", "text": TOK}')),
        Case("A row is a list", rows('["a.png", "TOK"]')),
        Case("A row is ten thousand lists, one in another", rows("[" * 10_000)),
        Case("A row does not name its image", rows({"text": "TOK"})),
        Case("A row has no caption", rows(ROW, {"file_name": "b.png"})),
        Case("A caption is null", rows(ROW, {"file_name": "b.png", "text": None})),
        Case("A caption is a number", rows(ROW, {"file_name": "b.png", "text": 7})),
        Case("A caption is a list of tags", rows(ROW, {"file_name": "b.png", "text": ["TOK", "red"]})),
        Case("A caption is blank", rows({**ROW, "text": " "})),
        Case("A row's image is missing", rows(ROW, {"file_name": "c.png", "text": "TOK"})),
        Case("A row's mask is missing", rows({**ROW, "mask_file_name": "a_mask.png"})),
        Case("A row names an image outside of the folder", rows({**ROW, "file_name": "../a.png"})),
        Case("A row names an image by its whole path", rows({**ROW, "file_name": "/pictures/a.png"})),
        Case("A row's image is a link to one elsewhere", link_out_of_the_folder),
        Case("An image has two rows", rows(ROW, ROW)),
        Case("metadata.jsonl is empty", writes(TABLE, "")),
        Case("metadata.jsonl is UTF-16", writes(TABLE, json.dumps(ROW).encode("utf-16"))),
        Case("There are two tables", writes("images/metadata.csv", "file_name,text\na.png,TOK\n")),
        Case("A CSV with semicolons", instead_of_table("images/metadata.csv", "file_name;text\na.png;TOK\n")),
        Case(
            "A comma in a caption of a CSV", instead_of_table("images/metadata.csv", "file_name,text\na.png,TOK, red\n")
        ),
        Case(
            "A CSV whose quotation mark is not closed",
            instead_of_table("images/metadata.csv", 'file_name,text\na.png,"T\n'),
        ),
        Case("A Parquet file that is none", instead_of_table("images/metadata.parquet", "file_name,text\na.png,TOK\n")),
        Case("The caption column does not exist", settings="--data.caption_column=words"),
        Case("Two columns may hold the captions", rows({**ROW, "prompt": "TOK, red"})),
        Case("A caption's text file is empty", instead_of_table("images/a.txt", "\n")),
        Case("A caption's text file is Latin-1", instead_of_table("images/a.txt", "TOK café".encode("latin-1"))),
        Case("caption_dropout is 1", settings="--data.caption_dropout=1"),
        Case("keep_tags without shuffle_tags", settings="--data.keep_tags=1"),
    ],
    "New tokens": [
        Case("No caption says the placeholder", rows({**ROW, "text": "a hat"})),
        Case("The placeholder is only a part of a word", settings='--model.tokens={"TO":1}'),
        Case("A placeholder is empty", settings='--model.tokens={"":1}'),
        Case("A placeholder has no token", settings='--model.tokens={"TOK":0}'),
        Case("Another word than a placeholder is initialised", settings='--model.initializers={"HAT":"hat"}'),
        Case("The word to start from is blank", settings='--model.initializers={"TOK":""}'),
        Case("Embeddings are given, but no tokens", settings=f"{EMBEDDINGS} --model.tokens=null"),
        Case(
            "Embeddings are of another base",
            tensors("e.safetensors", clip_l=(1, 768), clip_g=(1, 1280)),
            EMBEDDINGS,
        ),
        Case(
            "Embeddings are of more tokens",
            tensors("e.safetensors", clip_l=(3, 32), clip_g=(3, 48)),
            EMBEDDINGS,
        ),
        Case("The embeddings' file does not exist", None, EMBEDDINGS),
        Case("Embeddings are pickled", pickled("e.pt"), "--model.embeddings=e.pt"),
    ],
    "Base": [
        Case("The base is neither a folder nor on the Hub", settings="--model.pretrained=nowhere"),
        Case("A folder that is no base", settings="--model.pretrained=images"),
        Case(
            "A single file in place of a folder", tensors("b.safetensors", x=(1,)), "--model.pretrained=b.safetensors"
        ),
        Case("Stable Diffusion 1.5", without("base/text_encoder_2", "base/tokenizer_2")),
        Case("SDXL's refiner", without("base/text_encoder", "base/tokenizer")),
        Case("The UNet's weights are missing", without(UNET)),
        Case("The UNet's weights are pickled", pickled("base/unet/diffusion_pytorch_model.bin", UNET)),
        Case("The UNet's weights are cut off", cut(UNET), late=True),
        Case("The UNet is for inpainting", in_config("base/unet/config.json", in_channels=9), late=True),
        Case("A tokenizer is missing", without("base/tokenizer")),
        Case("There is no such variant", settings="--model.variant=fp16"),
        Case("The scheduler's config is cut off", writes("base/scheduler/scheduler_config.json", "{")),
        Case("The scheduler predicts x0", in_config("base/scheduler/scheduler_config.json", prediction_type="sample")),
        Case("beta_start is a word", in_config("base/scheduler/scheduler_config.json", beta_start="small")),
        Case("The VAE is neither a folder nor on the Hub", settings="--model.vae=nowhere"),
        Case("clip_skip is larger than a text encoder", settings="--model.clip_skip=9"),
    ],
    "Settings": [
        Case("A class is misspelled", settings="--model=SDXLModul"),
        Case("The case of a class is wrong", settings="--model.adapter=Lora"),
        Case("Half of a class's name", settings="--data=CaptionedImages"),
        Case("A class of another kind", settings="--model.adapter=EDMLoss"),
        Case("A key is misspelled", settings="--model.adapter.rankk=4"),
        Case("A key of the trainer is misspelled", changed("max_steps", "maximum_steps")),
        Case("A key of the config is misspelled", changed("trainer:", "trainr:")),
        Case("An option is misspelled", settings="--mdel=SDXLModule"),
        Case("A word for a number", settings="--data.batch_size=four"),
        Case("A word for a number in a list", settings="--data.seeds=[1,two]", command="predict"),
        Case("A learning rate that is no number", None, "--model.optimizer=AdamW --model.optimizer.lr=1e-4x"),
        Case("A learning rate below 0", None, "--model.optimizer=AdamW --model.optimizer.lr=-1"),
        Case(
            "A learning rate of GroupedProdigy below 0",
            None,
            "--model.optimizer=GroupedProdigy --model.optimizer.lr=-1",
        ),
        Case(
            "Two learning rates for prodigyopt's Prodigy",
            None,
            "--model.optimizer=prodigyopt.Prodigy --model.optimizer.lr=1 --model.embeddings_lr=2",
        ),
        Case(
            "A decay without an end",
            None,
            "--model.optimizer=AdamW --model.lr_scheduler=WarmupSchedule --model.lr_scheduler.decay=cosine",
        ),
        Case("The config does not exist", None, "fit --config no.yaml", "lit-edm"),
        Case("The config is not YAML", writes(CONFIG, "model:\n  class_path: X\n init_args: 3\n")),
        Case("A tab in the config", writes(CONFIG, "model:\n\tclass_path: SDXLModule\n")),
        Case("The config is Latin-1", writes(CONFIG, b"# caf\xe9\n")),
        Case("The config is empty", writes(CONFIG, "")),
        Case("A key is there twice", changed("TOK: 1", "TOK: 1\n      TOK: 2")),
        Case("A config that would run code", writes(CONFIG, "model: !!python/object/apply:os.system ['ls']\n")),
        Case("The resolution does not divide by the VAE's factor", settings="--data.resolution=17"),
        Case("The resolution is 0", settings="--data.resolution=0"),
        Case("batch_size is 0", settings="--data.batch_size=0"),
        Case("repeats is 0", settings="--data.repeats=0"),
        Case("num_workers is negative", settings="--data.num_workers=-1"),
        Case("No device", settings="--trainer.devices=0"),
        Case("A strategy that does not exist", settings="--trainer.strategy=ddpp"),
        Case("A negative number of steps", settings="--trainer.max_steps=-5"),
        Case("Gradients of no batch", settings="--trainer.accumulate_grad_batches=0"),
        Case("A file where the run's folder is to be", writes("run", "")),
        Case(
            "A file where logs are to be",
            writes("logs", ""),
            "--trainer.logger=ResumableCSVLogger --trainer.logger.save_dir=logs",
        ),
        Case(
            "A file where latents are to be kept",
            writes("kept", ""),
            "--data.latent_cache=DiskCache --data.latent_cache.folder=kept",
        ),
        Case(
            "A file where encoded captions are to be kept",
            writes("kept", ""),
            "--model.tokens=null --model.text_cache=DiskCache --model.text_cache.folder=kept",
        ),
        Case("A precision that does not exist", settings="--trainer.precision=fp8"),
        Case("Weights in half precision", settings="--trainer.precision=16-true"),
        Case(
            "Noise of a timestep-trained base for an EDM-native one",
            None,
            f"{LOSS} --model.loss.noise=UniformTimesteps --model.pretrained=edm",
        ),
        Case(
            "Noise levels that the base does not know",
            None,
            f"{LOSS} --model.loss.noise=LogUniform --model.loss.noise.sigma_min=0.002 --model.loss.noise.sigma_max=80",
        ),
        Case("A spread below 0", settings=f"{LOSS} --model.loss.noise=LogNormal --model.loss.noise.p_std=-1"),
        Case("Weights in int8 that are trained", settings="--model.adapter=FullFinetune --model.quantization=int8"),
        Case("Nothing is trained", settings="--model.adapter=null --model.tokens=null"),
        Case("A learning rate of what is not trained", settings="--model.text_encoders_lr=1e-4"),
        Case("The adapter's rank is 0", settings="--model.adapter.rank=0"),
        Case("The adapter's alpha is negative", settings="--model.adapter.alpha=-1"),
        Case("The adapter drops out more than everything", settings="--model.adapter.dropout=1.5"),
        Case("No activations fit", settings="--model.gradient_checkpointing=0.0001"),
        Case("A block that does not exist", settings='--model.adapter.blocks=["nosuch"]'),
        Case("A layer that does not exist", settings='--model.adapter.target_modules=["nosuch"]'),
        Case("A rank of a layer that is not trained", settings='--model.adapter.ranks={"conv_in":4}'),
        Case(
            "FreezeEmbeddings without new tokens", settings="--model.tokens=null --trainer.callbacks=FreezeEmbeddings"
        ),
        Case("ValidationLoss without held-out images", settings="--trainer.callbacks=ValidationLoss"),
        Case("ti_frac is more than 1", settings="--trainer.callbacks=FreezeEmbeddings --trainer.callbacks.ti_frac=1.5"),
        Case("A path for the adapter's name", None, "--trainer.callbacks=SaveAdapter --trainer.callbacks.name=a/b"),
        Case(
            "Class images among the images",
            None,
            "--data.prior=ClassImages --data.prior.root=images --data.prior.prompt=hat",
        ),
        Case(
            "No class images, and none to be rendered",
            None,
            "--data.prior=ClassImages --data.prior.root=classes --data.prior.prompt=hat",
        ),
        Case("The checkpoint to resume from does not exist", settings="--ckpt_path=none.ckpt"),
        Case("There is no last checkpoint", settings="--ckpt_path=last"),
    ],
    "Adapters and pictures": [
        Case("The prompts' file does not exist", None, "--data.prompts_file=p.txt", "predict"),
        Case("There is no prompt", writes("p.txt", "\n"), "--data.prompts=null --data.prompts_file=p.txt", "predict"),
        Case("The prompts' file is Latin-1", writes("p.txt", b"caf\xe9"), "--data.prompts_file=p.txt", "predict"),
        Case("A seed is negative", None, "--data.seeds=[-1]", "predict"),
        Case("A picture's height does not divide by the VAE's factor", None, "--data.height=17", "predict"),
        Case("Scales without an adapter", None, "--data.adapter_scales=[0.5]", "predict"),
        Case("An adapter does not exist", None, ADAPTERS, "predict"),
        Case("An adapter is cut off", lambda: (adapter()(), cut("a.safetensors")()), ADAPTERS, "predict"),
        Case(
            "An adapter whose header says it is terabytes long",
            writes("a.safetensors", b"\xff" * 5 + b"\0\0\0{"),
            ADAPTERS,
            "predict",
        ),
        Case("An adapter of another kind of model", tensors("a.safetensors", transformer=(2, 2)), ADAPTERS, "predict"),
        Case("An adapter whose header is damaged", adapter(lora_adapter_metadata="{"), ADAPTERS, "predict"),
        Case("An adapter of another base", adapter(width=640), ADAPTERS, "predict"),
        Case(
            "An adapter of another base, to train on",
            adapter(width=640),
            FROM_FILE,
        ),
        Case("An adapter to train on does not exist", None, FROM_FILE),
        Case("An adapter to train on is cut off", lambda: (adapter()(), cut("a.safetensors")()), FROM_FILE),
        Case("A guidance interval upside down", None, "--model.generation.guidance_interval=[5,1]", "predict"),
        Case("A checkpoint to export that does not exist", None, "last.ckpt out", "export"),
        Case("A checkpoint to export that is text", writes("last.ckpt", "hello"), "last.ckpt out", "export"),
        Case("A pickled adapter to export", pickled("a.pt"), "a.pt out", "export"),
        Case(
            "A file where the exported files are to be",
            lambda: (adapter()(), writes("out", "")()),
            "a.safetensors out",
            "export",
        ),
        Case("A format that does not exist", adapter(), "a.safetensors out --formats onnx", "export"),
        Case("An export into a folder that holds something", adapter(), "a.safetensors images --base base", "export"),
        Case(
            "An adapter merged with itself", adapter(), "--adapters a.safetensors a.safetensors --output out", "merge"
        ),
        Case("A merge into nowhere", adapter(), "--adapters a.safetensors", "merge"),
        Case(
            "A merge that keeps more than all",
            adapter(),
            "--adapters a.safetensors --output out --method ties --density 2",
            "merge",
        ),
    ],
}
