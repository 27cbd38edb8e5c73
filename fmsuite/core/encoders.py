"""Any frozen encoder under one interface: a run, a file, a timm model, the Hugging Face hub, a published checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import fmsuite
from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import SWIN_UNETR, ModelConfig
from fmsuite.core.backbones.datewise import TIME, Datewise, over_dates
from fmsuite.core.backbones.swin_unetr import SwinUNETR, is_published, published
from fmsuite.core.backbones.timm_backbone import PREFIX, TimmBackbone
from fmsuite.core.backbones.timm_layout import load_equal, to_timm
from fmsuite.core.backbones.timm_models import open_timm
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.backbones.wavelengths import carry_over
from fmsuite.core.backbones.weights import read_checkpoint, recognise, unwrap
from fmsuite.core.data.pipeline import IMAGE, WholeWindows
from fmsuite.core.data.sample import View
from fmsuite.core.input_words import OWN, normalisation_sentence
from fmsuite.core.inputs import Channel, InputSpec, Normalize
from fmsuite.core.plugins import load_plugin
from fmsuite.core.weight_files import METADATA_KEY, contiguous, write_weights
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

WEIGHTS = "encoder.safetensors"
DESCRIPTION = "encoder.json"
HUB = "hf-hub:"
FORMAT = 1
POOLINGS = ("cls", "mean", "cls+mean")


class Encoder(nn.Module):
    """A backbone with everything needed to use it on raw values: normalisation, pooling, and where it came from.

    Args:
        backbone: set to evaluation mode, gradients off.
        spec: the input that raw values must meet.
        pooling: ``cls``, ``mean`` or ``cls+mean``.
        provenance: where it came from, JSON values only.

    Raises:
        UsageError: for an unknown pooling, or one that needs a class token the backbone does not have.
    """

    def __init__(self, backbone: Backbone, spec: InputSpec, pooling: str, provenance: Mapping[str, Any]) -> None:
        super().__init__()
        _check_pooling(backbone, pooling)
        self.backbone = backbone
        self.spec = spec
        self.pooling = pooling
        self.provenance = dict(provenance)
        self.normalize = Normalize(spec)
        self.requires_grad_(False)
        self.eval()

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.backbone.width * (2 if self.pooling == "cls+mean" else 1)

    @cached_property
    def identity(self) -> str:
        """A hash of weights, shape, input and pooling: equal identities give equal embeddings."""
        return identity(self.backbone.state_dict(), description(self.backbone, self.spec, self.pooling))

    @property
    def normalisation(self) -> str:
        """One sentence on what raw values become, and whose mean and standard deviation it is."""
        before = self.provenance.get("channels_before") or self.spec.channel_names
        new = [name for name in self.spec.channel_names if name not in before]
        whose = f"{OWN}; the data's of {', '.join(new)}, which it was not trained on" if new else OWN
        return normalisation_sentence(self.spec, whose)

    def normalized(self, pixels: Tensor | View) -> View:
        """Raw values, alone or as a view, as the backbone takes them."""
        view = pixels if isinstance(pixels, View) else View(pixels)
        return self.normalize.view(view)

    def features(self, view: Tensor | View, layers: Sequence[int] = (), norm_layers: bool = True) -> Features:
        """Tokens of raw values, (B, C, *size) or (B, N, D); see ``Backbone.forward`` for the layers.

        Raises:
            UsageError: if the number of channels or axes is not the encoder's.
        """
        normal = self.normalized(self._checked(view))
        return self.backbone(normal, layers=layers, norm_layers=norm_layers)

    @torch.no_grad()
    def embed(self, pixels: Tensor | View) -> Tensor:
        """(B, dim) float32 of raw values, (B, C, *size) or (B, N, D).

        Raises:
            UsageError: as ``features``.
        """
        return self.features(pixels).pooled(self.pooling).float()

    def read(self, path: str | Path) -> View:
        """A file, read as those were that the encoder was trained on: its orientation, spacing and intensities.

        Returns:
            (N, C, *size) raw values, a row for each window that ``fmsuite tile`` would find in the file, in that order;
            an image that is one window is one row. ``embed`` and ``features`` take them.

        Raises:
            UsageError: if the encoder does not say how files are read, or its domain is not installed.
            ReadFailure: if the file, or a window of it, cannot be read.
        """
        reading = self.spec.reading
        if reading is None:
            raise UsageError(
                "This encoder does not say how files are read.",
                "Read the pixels yourself, as encoder.spec describes them, or use `fmsuite tile` and `fmsuite embed`.",
            )
        index, reader, spec = load_plugin(reading.domain).open_file(self.spec, path)
        windows = WholeWindows(index, reader, spec, self.spec.size, self.backbone.grid)
        batch, skipped = windows[range(len(index))]
        if skipped or batch is None:
            raise ReadFailure(str(path), skipped[0].stage, skipped[0].reason)
        (view,) = batch.views[IMAGE]
        return view

    def fitted(self, data: InputSpec) -> Encoder:
        """This encoder for the dates of some data (see ``seeing_dates``), and for their bands where it computes its
        embedding from wavelengths; otherwise itself.

        A band is one of the encoder's if name and wavelength are, and then keeps its mean and standard deviation;
        those of other bands are the data's.

        Raises:
            UsageError: for a channel without a wavelength that it was not trained on.
        """
        return seeing_dates(self._with_bands(data), data)

    def _with_bands(self, data: InputSpec) -> Encoder:
        if not _computes_embedding(self.backbone):
            return self
        mine = {(channel.name, channel.wavelength): channel for channel in self.spec.channels}
        channels = [
            mine.get((channel.name, channel.wavelength))
            or channel.model_copy(update={"group": None, "quantification": quantification})
            for channel, quantification in zip(data.channels, data.quantifications, strict=True)
        ]
        return self if tuple(channels) == self.spec.channels else select_channels(self, channels)

    def check_input(self, spec: InputSpec) -> None:
        """Refuse data that this encoder was not made for. Where positions are counted in lengths, spacings may differ.

        Raises:
            UsageError: listing every difference and the way out.
        """
        mine = self.spec
        plain = self.backbone.single if isinstance(self.backbone, Datewise) else self.backbone
        if isinstance(plain, VisionTransformer) and plain.config.position_units == "physical":
            mine = mine.model_copy(update={"spacing": None})
        differences = mine.differences(spec)
        if differences:
            raise UsageError(
                f"The encoder's input and the data differ: {'; '.join(differences)}.",
                "Read the data as the encoder expects it, or use fewer of its channels (--channels, or channels=).",
            )

    def _checked(self, pixels: Tensor | View) -> Tensor | View:
        tensor = pixels.pixels if isinstance(pixels, View) else pixels
        dims = 3 if self.spec.bag else 2 + len(self.spec.axes)
        channels = tensor.shape[-1 if self.spec.bag else 1] if tensor.dim() == dims else -1
        if channels != self.spec.in_chans:
            form = (
                f"(B, N, {self.spec.in_chans})"
                if self.spec.bag
                else f"(B, {self.spec.in_chans}, {', '.join(self.spec.axes)})"
            )
            raise UsageError(f"The encoder takes {form}, not an array of shape {tuple(tensor.shape)}.")
        return pixels


def load_encoder(
    what: str | Path,
    *,
    channels: Sequence[str | Channel] | None = None,
    heads: int | None = None,
    spec: InputSpec | None = None,
    pooling: str | None = None,
) -> Encoder:
    """Open an encoder.

    Args:
        what: a run folder (``encoder.safetensors``); an exported ``.safetensors`` file, which carries its description
            or has it beside it as ``.json``; ``timm:NAME`` with timm's published weights, ``timm:NAME@FILE`` with those
            of a file; ``hf-hub:OWNER/NAME``; or a checkpoint of the MAE, DINO, DINOv2, I-JEPA and Swin UNETR
            releases or of a plain ViT, recognised by its keys.
        channels: use only these of the encoder's channels, in this order, or others that it was not trained on, where
            it computes its embedding from wavelengths; see ``select_channels``.
        heads: attention heads of a recognised checkpoint, where they are not those of its published size.
        spec: input of a recognised checkpoint, where it is not 8-bit RGB with ImageNet statistics.
        pooling: in place of the encoder's own.

    Raises:
        UsageError: if there is nothing of that name, or an argument does not fit it.
        FmsuiteError: if a file is damaged or weights cannot be fetched.
    """
    text = str(what)
    if (heads is not None or spec is not None) and (text.startswith((PREFIX, HUB)) or Path(text).is_dir()):
        raise UsageError(f"{text} describes itself; heads and spec are for original checkpoints.", "Leave them out.")
    if text.startswith(PREFIX):
        name, _, file = text.removeprefix(PREFIX).partition("@")
        encoder = _timm_encoder(name, Path(file) if file else None)
    elif text.startswith(HUB):
        encoder = _hub_encoder(text.removeprefix(HUB))
    else:
        encoder = _file_encoder(Path(text), heads, spec)
    if pooling is not None:
        encoder = Encoder(encoder.backbone, encoder.spec, pooling, encoder.provenance)
    return encoder if channels is None else select_channels(encoder, channels)


def select_channels(encoder: Encoder, channels: Sequence[str | Channel]) -> Encoder:
    """The same encoder on some of its channels: ten bands pretrained, six at hand.

    The kernel slices of the named channels are kept and multiplied by (channels before / channels after), so that
    patches keep their expected magnitude; the others are gone. The given order is the new channel order.

    An encoder that computes its kernel from wavelengths (``model.patch_embedding: wavelength``) takes any channels with
    one, as ``Channel`` with mean and standard deviation of their own; its generator is kept as it is.

    Args:
        channels: names of the encoder's channels, or channels.

    Raises:
        UsageError: for an unknown or repeated channel name, or an encoder that is no vision transformer with a single
            channel group.
    """
    known = encoder.spec.channel_names
    names = [channel if isinstance(channel, str) else channel.name for channel in channels]
    free = _computes_embedding(encoder.backbone)
    unknown = [
        name for name, given in zip(names, channels) if name not in known and (isinstance(given, str) or not free)
    ]
    if unknown or not names or len(set(names)) != len(names):
        problem = f"no channel {', '.join(unknown)}" if unknown else "each channel can be named once, and one at least"
        raise UsageError(f"channels={names}: {problem}.", f"The encoder's channels: {', '.join(known)}.")
    if free:
        return _on_other_bands(encoder, channels)
    old = encoder.backbone
    if not isinstance(old, VisionTransformer) or old.grid is None:
        raise UsageError(f"Channels of a {type(old).__name__} over {encoder.spec.axes} cannot be selected.")
    if len(encoder.spec.groups) > 1:
        raise UsageError(
            "This encoder has channel groups, each with tokens of its own.",
            "Give all channels and mark the missing ones as invalid (View.valid).",
        )
    picked = [known.index(name) for name in names]
    new_spec = encoder.spec.model_copy(update={"channels": tuple(encoder.spec.channels[i] for i in picked)})
    backbone_spec = old.spec.model_copy(update={"channels": new_spec.channels})
    backbone = VisionTransformer(old.config, backbone_spec)
    state = old.state_dict()
    kernel = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = kernel[:, picked] * (len(known) / len(picked))
    backbone.load_state_dict(state)
    provenance = {**encoder.provenance, "channels_selected": names, "channels_before": list(known)}
    return Encoder(backbone, new_spec, encoder.pooling, provenance)


def seeing_dates(encoder: Encoder, data: InputSpec) -> Encoder:
    """An encoder as it takes the data: one of single images, where these are series of such images, takes their dates
    one by one (``Datewise``). Any other is returned as it is; what else differs ``Encoder.check_input`` tells."""
    if encoder.spec.bag or data.bag or data.axes != (TIME, *encoder.spec.axes):
        return encoder
    spec = over_dates(encoder.spec, data.size[0])
    backbone = Datewise(encoder.backbone, over_dates(encoder.backbone.spec, data.size[0]))
    provenance = {**encoder.provenance, "dates_one_by_one": True}
    return Encoder(backbone, spec, encoder.pooling, provenance)


def _computes_embedding(backbone: Backbone) -> bool:
    return isinstance(backbone, VisionTransformer) and backbone.config.patch_embedding == "wavelength"


def _on_other_bands(encoder: Encoder, channels: Sequence[str | Channel]) -> Encoder:
    old = encoder.backbone
    assert isinstance(old, VisionTransformer)
    mine = {channel.name: channel for channel in encoder.spec.channels}
    bands = tuple(mine[channel] if isinstance(channel, str) else channel for channel in channels)
    backbone = VisionTransformer(old.config, old.spec.model_copy(update={"channels": bands}))
    state = old.state_dict()
    carry_over(state, old.spec, backbone.spec, "This encoder")
    backbone.load_state_dict(state)
    names = [channel.name for channel in bands]
    provenance = {**encoder.provenance, "channels_selected": names, "channels_before": list(mine)}
    return Encoder(backbone, encoder.spec.model_copy(update={"channels": bands}), encoder.pooling, provenance)


def description(backbone: Backbone, spec: InputSpec, pooling: str) -> dict[str, Any]:
    """What decides the embeddings beside the weights, as JSON values. Options at their defaults are left out, so that
    an option that a later version adds changes no identity."""
    if not isinstance(backbone, VisionTransformer | TimmBackbone | SwinUNETR | Datewise):
        raise UsageError(f"A {type(backbone).__name__} cannot be saved as an encoder.")
    model = backbone.config.model_copy(update={"weights": None, "input_size": None})
    return {
        "format": FORMAT,
        "model": model.model_dump(mode="json", exclude_defaults=True) | {"name": model.name},
        "input": spec.model_dump(mode="json"),
        "pooling": pooling,
    }


def _model_options(backbone: Backbone | ModelConfig) -> dict[str, Any]:
    """Every option, so that a later version's defaults change nothing about a stored encoder. Of a foreign model only
    those that are set: the others do not apply to it."""
    config = backbone if isinstance(backbone, ModelConfig) else backbone.config
    assert isinstance(config, ModelConfig)
    foreign = config.name.startswith(PREFIX) or config.name == SWIN_UNETR
    return config.model_dump(mode="json", exclude={"weights", "input_size"}, exclude_defaults=foreign) | {
        "name": config.name
    }


def identity(state: Mapping[str, Tensor], described: Mapping[str, Any]) -> str:
    """BLAKE2b over the description and every tensor (name, dtype, shape, bytes); 32 hexadecimal digits."""
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16)
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"\0{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_encoder(
    folder: str | Path, backbone: Backbone, spec: InputSpec, pooling: str, provenance: Mapping[str, Any]
) -> Path:
    """Write ``encoder.safetensors`` and ``encoder.json`` into a folder; each appears whole or not at all.

    The weights file carries the description too, so that it can be moved alone; ``encoder.json`` is the same for
    people and other tools.

    Args:
        folder: made if missing.
        backbone: a ``VisionTransformer`` or ``TimmBackbone``.
        spec: the input, with the normalisation that was used. Its size is replaced by the backbone's.
        pooling: how tokens become one vector.
        provenance: JSON values.

    Returns:
        The weights file.

    Raises:
        UsageError: if ``spec`` is not the backbone's input (another size aside), or the backbone is of another kind.
        FmsuiteError: if the files cannot be written.
    """
    folder = Path(folder)
    differences = backbone.spec.differences(spec.model_copy(update={"spacing": backbone.spec.spacing}))
    if differences:
        raise UsageError(f"{folder}: the backbone's input is another: {'; '.join(differences)}.")
    if spec.size != backbone.spec.size:
        spec = spec.model_copy(update={"size": backbone.spec.size, "spacing": backbone.spec.spacing})
    _check_pooling(backbone, pooling)
    state = contiguous(backbone.state_dict())
    described = {**description(backbone, spec, pooling), "model": _model_options(backbone), "layout": "native"}
    described["identity"] = identity(state, description(backbone, spec, pooling))
    described["provenance"] = {"fmsuite": fmsuite.__version__, **provenance}
    return write_weights(folder / WEIGHTS, folder / DESCRIPTION, state, described)


def export_encoder(encoder: Encoder, path: str | Path, layout: Literal["timm", "native"] = "timm") -> Path:
    """Write an encoder as one ``.safetensors`` file, with its description in the metadata and beside it as ``.json``.

    ``timm`` uses timm's names and nothing else: ``timm.create_model(name, **arguments, checkpoint_path=path)`` loads
    the file with the name and arguments that the description suggests under ``timm``. ``native`` keeps this package's
    own, for inputs and positions that timm does not have. ``load_encoder`` opens both.

    Raises:
        UsageError: naming why timm cannot hold the encoder; for a path without ``.safetensors``.
        FmsuiteError: if the files cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: an exported encoder is a .safetensors file.", "Give it that suffix.")
    backbone, spec = encoder.backbone, encoder.spec
    described = {**description(backbone, spec, encoder.pooling), "identity": encoder.identity}
    described["model"] = _model_options(backbone)
    described["provenance"] = {"fmsuite": fmsuite.__version__, **encoder.provenance}
    described["layout"] = layout
    if layout == "native":
        state = backbone.state_dict()
    elif isinstance(backbone, TimmBackbone):
        state = backbone.model.state_dict()
        described["timm"] = {
            "name": backbone.config.name.removeprefix(PREFIX),
            "arguments": {"num_classes": 0, "in_chans": spec.in_chans},
            **_timm_data(spec),
        }
    elif isinstance(backbone, SwinUNETR | Datewise):
        what = "Swin UNETR" if isinstance(backbone, SwinUNETR) else "axis of time"
        raise UsageError(f"{path}: timm has no {what}.", "Use layout native.")
    else:
        assert isinstance(backbone, VisionTransformer)
        form = to_timm(backbone, encoder.pooling)
        state = form.state
        described["model"] = _model_options(form.config)
        described["timm"] = {"name": form.name, "arguments": form.arguments, **_timm_data(spec)}
        described["left_out"] = ["mask_token"]
        described["folded"] = list(form.folded)
    return write_weights(path, path.with_suffix(".json"), contiguous(state), described)


def _timm_data(spec: InputSpec) -> dict[str, Any]:
    """timm's data configuration, where its convention (values from 0 to 1 of 8-bit images) holds."""
    if not spec.eight_bit:
        return {}
    mean, std = [c.mean for c in spec.channels], [c.std for c in spec.channels]
    return {"data": {"input_size": [spec.in_chans, *spec.size], "mean": mean, "std": std}}


def _check_pooling(backbone: Backbone, pooling: str) -> None:
    if pooling not in POOLINGS:
        raise UsageError(f"There is no pooling '{pooling}'.", f"Use one of {', '.join(POOLINGS)}.")
    if pooling != "mean" and not backbone.has_cls:
        raise UsageError(f"Pooling '{pooling}' needs a class token and this backbone has none.", "Use mean.")


def _file_encoder(path: Path, heads: int | None, spec: InputSpec | None) -> Encoder:
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise UsageError(f"{path}: this folder holds no {WEIGHTS}.", "Is it a run folder, and has its run ended?")
        path = path / WEIGHTS
    if not path.is_file():
        raise UsageError(
            f"There is no encoder '{path}'.",
            f"Give a run folder, a weight file, {PREFIX}NAME or {HUB}OWNER/NAME.",
        )
    described = _read_description(path)
    if described is not None:
        if heads is not None or spec is not None:
            raise UsageError(
                f"{path} describes itself; heads and spec are for original checkpoints.", "Leave them out."
            )
        return _described_encoder(path, described)
    checkpoint = read_checkpoint(path)
    weights, _, _ = unwrap(checkpoint, str(path))
    if is_published(weights):
        if heads is not None:
            raise UsageError(f"{path}: a Swin UNETR's heads are read from its weights.", "Leave heads out.")
        swin, notes = published(weights, str(path), spec)
        return Encoder(swin, swin.spec, "mean", notes)
    found = recognise(checkpoint, str(path), heads=heads, spec=spec)
    backbone = VisionTransformer(found.config, found.spec)
    missing = load_equal(backbone, found.state, str(path))
    return Encoder(backbone, found.spec, found.pooling, {**found.notes, "not_in_file": missing})


def _read_description(path: Path) -> dict[str, Any] | None:
    """The description in a file's metadata, or beside it; ``None`` if it has none and is a foreign checkpoint."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise FmsuiteError(f"{path}: not a readable safetensors file ({error}).") from error
    beside = path.with_suffix(".json")
    origin = path
    if text is None and beside.is_file():
        text, origin = beside.read_text(encoding="utf-8"), beside
    if text is None:
        return None
    try:
        described = json.loads(text)
    except json.JSONDecodeError as error:
        raise FmsuiteError(f"{origin}: the description is not valid JSON ({error}).") from error
    if not isinstance(described, dict) or not {"format", "model", "input", "pooling"} <= described.keys():
        if origin == beside:
            return None
        raise FmsuiteError(f"{origin}: the description lacks format, model, input or pooling.")
    if described["format"] != FORMAT:
        raise FmsuiteError(
            f"{origin}: has format {described['format']}; this version reads {FORMAT}.", "Update fmsuite."
        )
    return described


def _described_encoder(path: Path, described: Mapping[str, Any]) -> Encoder:
    try:
        config = ModelConfig.model_validate(described["model"])
        spec = InputSpec.model_validate(described["input"])
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise FmsuiteError(f"{path}: its description cannot be used: {place}: {problem['msg']}.") from error
    backbone = build_backbone(config, spec)
    state = read_checkpoint(path)
    if isinstance(backbone, TimmBackbone) and described.get("layout") == "timm":
        state = {f"model.{key}": value for key, value in state.items()}
    provenance = {**described.get("provenance", {}), "file": str(path)}
    if isinstance(backbone, VisionTransformer):
        provenance["not_in_file"] = load_equal(backbone, state, str(path))
    else:
        try:
            backbone.load_state_dict(state)
        except RuntimeError as error:
            raise FmsuiteError(f"{path}: the weights do not fit {config.name}: {error}.") from error
    return Encoder(backbone, spec, described["pooling"], provenance)


def _timm_encoder(name: str, file: Path | None) -> Encoder:
    backbone, notes = open_timm(name, file)
    return Encoder(backbone, backbone.spec, backbone.own_pooling, notes)


def _hub_encoder(repository: str) -> Encoder:
    """An encoder that this package saved, or a timm model, from the Hugging Face hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _file_encoder(Path(hf_hub_download(repository, WEIGHTS)), None, None)
    except LocalEntryNotFoundError as error:
        raise FmsuiteError(
            f"{HUB}{repository}: the Hugging Face hub cannot be reached.",
            f"Fetch the weights on a machine with network access and give the file ({PREFIX}NAME@FILE for a timm "
            "model), or point HF_HOME to a cache that holds them.",
        ) from error
    except EntryNotFoundError:
        return _timm_encoder(HUB + repository, None)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FmsuiteError(f"{HUB}{repository}: {reason}.", "Check the name, and log in if it is gated.") from error
