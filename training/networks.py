"""Denoising networks of Karras et al. 2022 (arXiv:2206.00364): two U-Nets, four preconditionings around them.

    SongUNet        DDPM++ and NCSN++ of Song et al. 2021 (arXiv:2011.13456)
    DhariwalUNet    ADM of Dhariwal & Nichol 2021 (arXiv:2105.05233)
    VPPrecond, VEPrecond, iDDPMPrecond, EDMPrecond    Table 1 of Karras et al.: D(x; sigma) around a raw network F

Constructor arguments, attributes and the names of all parameters and buffers are those of EDM's code, so that weights
travel both ways. This file's text itself travels inside network pickles and is run by EDM's loader as a module of its
own: it imports nothing but the standard library, torch and `torch_utils.persistence`, parses under Python 3.8, and
keeps no state that EDM's classes would not have.

Weights are float32. Each layer casts them to the type of its input, so a network runs in half precision by being fed
half precision images; the embedding of noise level and labels stays in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_utils.persistence import persistent_class

# ---------------------------------------------------------------------------------------------------------------------
# Functions


def initial_weights(shape: Sequence[int], mode: str, fan_in: int, fan_out: int) -> Tensor:
    """Random weights in the manner of `mode`: (xavier|kaiming)_(uniform|normal). Deviation sqrt(2 / (in + out)) for
    Xavier, sqrt(1 / in) for Kaiming."""
    variances = {"xavier": 2 / (fan_in + fan_out), "kaiming": 1 / fan_in}
    family, _, distribution = mode.partition("_")
    if family not in variances or distribution not in ("uniform", "normal"):
        raise ValueError(f"unknown init_mode '{mode}'; there are xavier and kaiming, each with _uniform and _normal")
    if distribution == "uniform":
        return math.sqrt(3 * variances[family]) * (torch.rand(*shape) * 2 - 1)
    return math.sqrt(variances[family]) * torch.randn(*shape)


def upsample(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
    """x [N, C, H, W] with zeros put between its pixels, filtered by 4 * kernel [1, 1, K, K]: [N, C, 2H, 2W] for
    padding (K - 1) // 2. Two taps are the box filter, that is, each pixel repeated."""
    if kernel.shape[-1] == 2:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    weight = (4 * kernel).expand(x.shape[1], -1, -1, -1)
    return F.conv_transpose2d(x, weight, stride=2, padding=padding, groups=x.shape[1])


def downsample(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
    """x [N, C, H, W] filtered by kernel [1, 1, K, K], every second pixel of it: [N, C, H/2, W/2] for padding
    (K - 1) // 2. Two taps are the box filter, that is, the mean of 2x2 pixels."""
    if kernel.shape[-1] == 2:
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, kernel.expand(x.shape[1], -1, -1, -1), stride=2, padding=padding, groups=x.shape[1])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v for q [..., Q, C], k [..., K, C], v [..., K, D]. Logits and softmax are float32 at
    least, whatever the type of q: fused kernels accumulate so, and half precision overflows otherwise."""
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v)
    logits = q.float() @ (k.float() / math.sqrt(k.shape[-1])).transpose(-2, -1)  # torch 1, as EDM's environment has
    return logits.softmax(dim=-1).to(v.dtype) @ v


def normalize(x: Tensor, norm: Any, shift: Any = None, scale: Any = None, act: bool = True) -> Tensor:
    """silu(norm(x + shift)), or with `scale`, silu(norm(x) * (scale + 1) + shift); without the silu if not `act`.

    x [N, C, H, W], norm a GroupNorm, shift and scale [N or 1, C].
    """
    if shift is not None:
        shift = shift[:, :, None, None]
    if scale is not None:
        x = torch.addcmul(shift, norm(x), scale[:, :, None, None] + 1)
    else:
        x = norm(x if shift is None else x + shift)
    return F.silu(x) if act else x


def drop_labels(labels: Tensor, probability: float) -> Tensor:
    """Labels [N, L] of which each row is zero with the given probability (for classifier-free guidance)."""
    return labels * (torch.rand([labels.shape[0], 1], device=labels.device) >= probability).to(labels.dtype)


def check_resolution(img_resolution: int, channel_mult: Sequence[int]) -> None:
    """Raises ValueError, naming resolutions that work, if the levels of a U-Net cannot halve the image."""
    halvings = len(channel_mult) - 1
    unit = 2**halvings
    if img_resolution < unit or img_resolution % unit:
        below = max(img_resolution // unit, 1) * unit
        raise ValueError(
            f"image resolution {img_resolution} cannot be halved {halvings} times by "
            f"channel_mult=[{','.join(map(str, channel_mult))}]; use a multiple of {unit}, such as {below} or "
            f"{below + unit}, or fewer levels"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@persistent_class
class Linear(nn.Module):
    """x [..., in_features] -> [..., out_features]. `init_*` scale the initial weights and bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        init: dict[str, Any] = {"mode": init_mode, "fan_in": in_features, "fan_out": out_features}
        self.weight = nn.Parameter(initial_weights([out_features, in_features], **init) * init_weight)
        self.bias = nn.Parameter(initial_weights([out_features], **init) * init_bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@persistent_class
class Conv2d(nn.Module):
    """Convolution of odd size, or none (`kernel` 0), after doubling (`up`) or halving (`down`) the resolution.

    [N, in_channels, H, W] -> [N, out_channels, H', W']. `fused_resample` joins the two filters so that less is cut off
    at the image border; when halving it convolves first. `resample_filter` must be symmetric and of even length.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ) -> None:
        if up and down:
            raise ValueError("a convolution can double or halve the resolution, not both")
        if len(resample_filter) % 2 or list(resample_filter) != list(resample_filter)[::-1]:
            raise ValueError(f"resample_filter {list(resample_filter)} shifts the image; use one such as [1,3,3,1]")
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.fused_resample = fused_resample
        area = kernel * kernel
        init: dict[str, Any] = {"mode": init_mode, "fan_in": in_channels * area, "fan_out": out_channels * area}
        weight = initial_weights([out_channels, in_channels, kernel, kernel], **init) * init_weight if kernel else None
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = nn.Parameter(initial_weights([out_channels], **init) * init_bias) if kernel and bias else None
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        kernel2d = taps.outer(taps)[None, None] / taps.sum().square()
        self.register_buffer("resample_filter", kernel2d if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        pad = 0 if weight is None else weight.shape[-1] // 2
        if self.resample_filter is not None:
            taps = self.resample_filter.to(x.dtype)
            taps_pad = (taps.shape[-1] - 1) // 2
            if self.fused_resample and weight is not None and self.down:
                return downsample(F.conv2d(x, weight, bias, padding=pad + taps_pad), taps, padding=0)
            if self.fused_resample and weight is not None:
                x, pad = upsample(x, taps, padding=max(taps_pad - pad, 0)), max(pad - taps_pad, 0)
            else:
                x = (upsample if self.up else downsample)(x, taps, padding=taps_pad)
        return x if weight is None else F.conv2d(x, weight, bias, padding=pad)


@persistent_class
class GroupNorm(nn.Module):
    """Group normalisation of [N, num_channels, H, W] with at least `min_channels_per_group` channels in a group."""

    def __init__(
        self, num_channels: int, num_groups: int = 32, min_channels_per_group: int = 4, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.num_groups = min(num_groups, num_channels // min_channels_per_group)
        self.eps = eps
        if self.num_groups < 1 or num_channels % self.num_groups:
            raise ValueError(
                f"{num_channels} channels cannot be normalised in equal groups; choose model_channels and channel_mult "
                f"that give multiples of {min_channels_per_group}, and of {num_groups} above "
                f"{num_groups * min_channels_per_group}"
            )
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@persistent_class
class PositionalEmbedding(nn.Module):
    """Noise labels [N] -> [N, num_channels]: cosines, then sines, of geometrically spaced frequencies from 1 down to
    1 / max_positions (reached if `endpoint`)."""

    def __init__(self, num_channels: int, max_positions: int = 10000, endpoint: bool = False) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.max_positions = max_positions
        self.endpoint = endpoint

    def forward(self, x: Tensor) -> Tensor:
        count = self.num_channels // 2
        ramp = torch.arange(count, dtype=torch.float32, device=x.device) / (count - int(self.endpoint))
        phase = x.outer(((1 / self.max_positions) ** ramp).to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


@persistent_class
class FourierEmbedding(nn.Module):
    """Noise labels [N] -> [N, num_channels]: cosines, then sines, of normally distributed frequencies."""

    freqs: Tensor

    def __init__(self, num_channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        phase = x.outer((2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


@persistent_class
class UNetBlock(nn.Module):
    """Residual block of both U-Nets, with attention behind it where asked for.

    x [N, in_channels, H, W], emb [N or 1, emb_channels] float32 -> [N, out_channels, H', W']. The embedding shifts the
    activations, and scales them if `adaptive_scale`. `num_heads` None means one head for every `channels_per_head`
    channels, which is none at all below that number: attention is then absent, as in EDM. `init_zero` is for the
    convolutions that end a residual branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0,
        skip_scale: float = 1,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: dict[str, Any] | None = None,
        init_zero: dict[str, Any] | None = None,
        init_attn: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        init = init or {}
        init_zero = {"init_weight": 0} if init_zero is None else init_zero
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.emb_channels = emb_channels
        self.num_heads = (out_channels // channels_per_head if num_heads is None else num_heads) if attention else 0
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        resample: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}

        self.norm0 = GroupNorm(num_channels=in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels=in_channels, out_channels=out_channels, kernel=3, **resample, **init)
        self.affine = Linear(in_features=emb_channels, out_features=out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(num_channels=out_channels, eps=eps)
        self.conv1 = Conv2d(in_channels=out_channels, out_channels=out_channels, kernel=3, **init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels=in_channels, out_channels=out_channels, kernel=kernel, **resample, **init)
        if self.num_heads:
            init_attn = init if init_attn is None else init_attn
            self.norm2 = GroupNorm(num_channels=out_channels, eps=eps)
            self.qkv = Conv2d(in_channels=out_channels, out_channels=out_channels * 3, kernel=1, **init_attn)
            self.proj = Conv2d(in_channels=out_channels, out_channels=out_channels, kernel=1, **init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shortcut = x if self.skip is None else self.skip(x)
        shift = self.affine(emb).to(x.dtype)
        scale, shift = shift.chunk(2, dim=1) if self.adaptive_scale else (None, shift)

        x = self.conv0(normalize(x, self.norm0))
        x = normalize(x, self.norm1, shift, scale)
        if self.training and self.dropout:
            x = F.dropout(x.contiguous(), p=self.dropout)  # masks are drawn in the order of memory
        x = self.conv1(x)
        x = (x + shortcut) * self.skip_scale

        if self.num_heads:
            x = (self.proj(self.attention(normalize(x, self.norm2, act=False))) + x) * self.skip_scale
        return x

    def attention(self, x: Tensor) -> Tensor:
        """Every pixel attends to all pixels of its image. x [N, C, H, W] -> same shape."""
        # The channels of qkv run over head, channel within the head, and (query, key, value), the last one fastest.
        # Fused attention takes only tensors whose last axis is contiguous: hence one copy.
        heads = self.qkv(x).reshape(x.shape[0], self.num_heads, x.shape[1] // self.num_heads, 3, -1)
        q, k, v = heads.permute(3, 0, 1, 4, 2).contiguous().unbind(0)  # each [N, heads, H * W, C / heads]
        # Contiguous, or this transpose would turn everything behind it, dropout's drawing order too, channels-last.
        return attend(q, k, v).transpose(2, 3).contiguous().reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# U-Nets: x [N, in_channels, R, R] -> [N, out_channels, R, R], given
#     noise_labels      [N or 1]
#     class_labels      [N or 1, label_dim]; ignored if label_dim is 0
#     augment_labels    [N or 1, augment_dim] or None, which means zeros; ignored if augment_dim is 0
#
# The names of blocks are part of the file format; the order of the ModuleDicts is the order of execution.


@persistent_class
class SongUNet(nn.Module):
    """DDPM++ (the defaults) and NCSN++ (Fourier embedding, residual encoder, channel_mult_noise 2, filter [1,3,3,1]).

    img_resolution      R, at input and output; the levels of `channel_mult` must be able to halve it
    label_dim           width of the class labels, 0 = unconditional
    augment_dim         width of the augmentation labels, 0 = none
    channel_mult        channels of each resolution, in units of `model_channels`
    channel_mult_emb    channels of the embedding, channel_mult_noise: of its input, in the same units
    num_blocks          residual blocks per resolution (one more in the decoder)
    attn_resolutions    resolutions with attention: every encoder block, the last decoder block
    label_dropout       probability of training without a class label
    encoder_type        'standard', 'residual' (NCSN++) or 'skip'; decoder_type 'standard' or 'skip'
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        for what, value, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"unknown {what} '{value}'; there are {', '.join(known)}")
        check_resolution(img_resolution, channel_mult)
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init: dict[str, Any] = {"init_mode": "xavier_uniform"}
        init_zero: dict[str, Any] = {"init_mode": "xavier_uniform", "init_weight": 1e-5}
        init_attn = {"init_mode": "xavier_uniform", "init_weight": math.sqrt(0.2)}
        block: dict[str, Any] = {
            "emb_channels": emb_channels,
            "num_heads": 1,
            "dropout": dropout,
            "skip_scale": math.sqrt(0.5),
            "eps": 1e-6,
            "resample_filter": resample_filter,
            "resample_proj": True,
            "adaptive_scale": False,
            "init": init,
            "init_zero": init_zero,
            "init_attn": init_attn,
        }

        self.map_noise = (
            PositionalEmbedding(num_channels=noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(num_channels=noise_channels)
        )
        self.map_label = Linear(in_features=label_dim, out_features=noise_channels, **init) if label_dim else None
        self.map_augment = (
            Linear(in_features=augment_dim, out_features=noise_channels, bias=False, **init) if augment_dim else None
        )
        self.map_layer0 = Linear(in_features=noise_channels, out_features=emb_channels, **init)
        self.map_layer1 = Linear(in_features=emb_channels, out_features=emb_channels, **init)

        # Encoder. 'aux' layers carry a small copy of the input down beside it.
        self.enc = nn.ModuleDict()
        cout, caux = in_channels, in_channels
        down: dict[str, Any] = {"down": True, "resample_filter": resample_filter}
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            name = f"{res}x{res}"
            if level == 0:
                cin, cout = cout, model_channels
                self.enc[f"{name}_conv"] = Conv2d(in_channels=cin, out_channels=cout, kernel=3, **init)
            else:
                self.enc[f"{name}_down"] = UNetBlock(in_channels=cout, out_channels=cout, down=True, **block)
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = Conv2d(in_channels=caux, out_channels=caux, kernel=0, **down)
                    self.enc[f"{name}_aux_skip"] = Conv2d(in_channels=caux, out_channels=cout, kernel=1, **init)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv2d(
                        in_channels=caux, out_channels=cout, kernel=3, **down, fused_resample=True, **init
                    )
                    caux = cout
            for idx in range(num_blocks):
                cin, cout = cout, model_channels * mult
                attn = res in attn_resolutions
                self.enc[f"{name}_block{idx}"] = UNetBlock(in_channels=cin, out_channels=cout, attention=attn, **block)
        skips: list[Any] = [layer.out_channels for name, layer in self.enc.items() if "aux" not in name]

        # Decoder. Its 'aux' layers make the output: once at full resolution, or ('skip') as a sum over all of them.
        self.dec = nn.ModuleDict()
        up: dict[str, Any] = {"up": True, "resample_filter": resample_filter}
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            name = f"{res}x{res}"
            if level == len(channel_mult) - 1:
                self.dec[f"{name}_in0"] = UNetBlock(in_channels=cout, out_channels=cout, attention=True, **block)
                self.dec[f"{name}_in1"] = UNetBlock(in_channels=cout, out_channels=cout, **block)
            else:
                self.dec[f"{name}_up"] = UNetBlock(in_channels=cout, out_channels=cout, up=True, **block)
            for idx in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                attn = idx == num_blocks and res in attn_resolutions
                self.dec[f"{name}_block{idx}"] = UNetBlock(in_channels=cin, out_channels=cout, attention=attn, **block)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(channel_mult) - 1:
                    channels: dict[str, Any] = {"in_channels": out_channels, "out_channels": out_channels}
                    self.dec[f"{name}_aux_up"] = Conv2d(**channels, kernel=0, **up)
                self.dec[f"{name}_aux_norm"] = GroupNorm(num_channels=cout, eps=1e-6)
                last = Conv2d(in_channels=cout, out_channels=out_channels, kernel=3, **init_zero)
                self.dec[f"{name}_aux_conv"] = last

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Any, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.embed(noise_labels, class_labels, augment_labels)

        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + layer(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x) if name.endswith("conv") else layer(x, emb)
                skips.append(x)

        output: Any = None
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                output = layer(output)
            elif name.endswith("aux_norm"):
                normed = normalize(x, layer)
            elif name.endswith("aux_conv"):
                addend = layer(normed)
                output = addend if output is None else output + addend
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return output

    def embed(self, noise_labels: Tensor, class_labels: Any, augment_labels: Tensor | None) -> Tensor:
        """Embedding [N or 1, emb_channels] of noise level, class and augmentation."""
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(emb.shape)  # sines first
        if self.map_label is not None:
            if self.training and self.label_dropout:
                class_labels = drop_labels(class_labels, self.label_dropout)
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


@persistent_class
class DhariwalUNet(nn.Module):
    """ADM. Arguments as in SongUNet; attention heads are 64 channels wide, and absent where there are fewer."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ) -> None:
        check_resolution(img_resolution, channel_mult)
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        third = math.sqrt(1 / 3)
        init: dict[str, Any] = {"init_mode": "kaiming_uniform", "init_weight": third, "init_bias": third}
        init_zero: dict[str, Any] = {"init_mode": "kaiming_uniform", "init_weight": 0, "init_bias": 0}
        init_label: dict[str, Any] = {"init_mode": "kaiming_normal", "init_weight": math.sqrt(label_dim)}
        block: dict[str, Any] = {
            "emb_channels": emb_channels,
            "channels_per_head": 64,
            "dropout": dropout,
            "init": init,
            "init_zero": init_zero,
        }

        self.map_noise = PositionalEmbedding(num_channels=model_channels)
        self.map_augment = (
            Linear(in_features=augment_dim, out_features=model_channels, bias=False, **init_zero)
            if augment_dim
            else None
        )
        self.map_layer0 = Linear(in_features=model_channels, out_features=emb_channels, **init)
        self.map_layer1 = Linear(in_features=emb_channels, out_features=emb_channels, **init)
        self.map_label = (
            Linear(in_features=label_dim, out_features=emb_channels, bias=False, **init_label) if label_dim else None
        )

        self.enc = nn.ModuleDict()
        cout = in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            name = f"{res}x{res}"
            if level == 0:
                cin, cout = cout, model_channels * mult
                self.enc[f"{name}_conv"] = Conv2d(in_channels=cin, out_channels=cout, kernel=3, **init)
            else:
                self.enc[f"{name}_down"] = UNetBlock(in_channels=cout, out_channels=cout, down=True, **block)
            for idx in range(num_blocks):
                cin, cout = cout, model_channels * mult
                attn = res in attn_resolutions
                self.enc[f"{name}_block{idx}"] = UNetBlock(in_channels=cin, out_channels=cout, attention=attn, **block)
        skips: list[Any] = [layer.out_channels for layer in self.enc.values()]

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            name = f"{res}x{res}"
            if level == len(channel_mult) - 1:
                self.dec[f"{name}_in0"] = UNetBlock(in_channels=cout, out_channels=cout, attention=True, **block)
                self.dec[f"{name}_in1"] = UNetBlock(in_channels=cout, out_channels=cout, **block)
            else:
                self.dec[f"{name}_up"] = UNetBlock(in_channels=cout, out_channels=cout, up=True, **block)
            for idx in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                attn = res in attn_resolutions
                self.dec[f"{name}_block{idx}"] = UNetBlock(in_channels=cin, out_channels=cout, attention=attn, **block)
        self.out_norm = GroupNorm(num_channels=cout)
        self.out_conv = Conv2d(in_channels=cout, out_channels=out_channels, kernel=3, **init_zero)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Any, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(normalize(x, self.out_norm))

    def embed(self, noise_labels: Tensor, class_labels: Any, augment_labels: Tensor | None) -> Tensor:
        """Embedding [N or 1, emb_channels] of noise level, class and augmentation."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            if self.training and self.label_dropout:
                class_labels = drop_labels(class_labels, self.label_dropout)
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)


UNETS: dict[str, Any] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}

# ---------------------------------------------------------------------------------------------------------------------
# Preconditioning


class Precond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), eq. 7 of Karras et al.; subclasses give the factors.

    img_resolution, img_channels    of the images
    label_dim                       width of the class labels, 0 = unconditional
    use_fp16                        run F in float16 on CUDA
    sigma_min, sigma_max            noise levels that the network knows
    compute_dtype                   set on an instance: the type F runs in, on any device, whatever `use_fp16` says
    """

    compute_dtype: torch.dtype | None = None
    transient = ("compute_dtype",)  # a setting of the moment, not part of a file

    sigma_min: float
    sigma_max: float
    init_kwargs: dict[str, Any]

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        model_type: str,
        model_kwargs: dict[str, Any],
        out_channels: int,
    ) -> None:
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        if model_type not in UNETS:
            raise ValueError(f"unknown model_type '{model_type}'; there are {', '.join(UNETS)}")
        of_data = {"img_resolution": img_resolution, "in_channels": img_channels, "label_dim": label_dim}
        self.model: nn.Module = UNETS[model_type](**of_data, out_channels=out_channels, **model_kwargs)

    def scalings(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        """(c_skip, c_out, c_in, c_noise) at noise levels sigma, each of its shape or a number."""
        raise NotImplementedError

    def round_sigma(self, sigma: Any) -> Tensor:
        """The nearest noise level that the network knows, of the shape and type of `sigma`."""
        return torch.as_tensor(sigma)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        **model_kwargs: Any,
    ) -> Tensor:
        """Denoised images, float32 like x [N, img_channels, R, R] at noise levels sigma [N] (or one for all).

        class_labels [N or 1, label_dim], none = zeros; ignored by an unconditional network. `model_kwargs` go to F
        (augment_labels [N, augment_dim]). Raises ValueError for labels of another width.
        """
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        elif class_labels.shape[-1] != self.label_dim:
            raise ValueError(f"class labels have {class_labels.shape[-1]} entries, the network takes {self.label_dim}")
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)

        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        dtype = torch.float32 if force_fp32 else self._dtype(x.device)
        F_x = self.model((c_in * x).to(dtype), c_noise.flatten(), class_labels=class_labels, **model_kwargs)
        return c_skip * x + c_out * F_x[:, : self.img_channels].to(torch.float32)

    def _dtype(self, device: torch.device) -> torch.dtype:
        if self.compute_dtype is not None:
            return self.compute_dtype
        return torch.float16 if self.use_fp16 and device.type == "cuda" else torch.float32


@persistent_class
class VPPrecond(Precond):
    """Variance preserving (Song et al. 2021); Table 1, column VP. The network knows t in [epsilon_t, 1]."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, model_kwargs, img_channels)
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.M = M
        self.epsilon_t = epsilon_t
        self.sigma_min = float(self.sigma(epsilon_t))
        self.sigma_max = float(self.sigma(1))

    def scalings(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)

    def sigma(self, t: Any) -> Tensor:
        """Noise level at time t, of the type of t (float32 for a number; not with expm1, as EDM's networks expect)."""
        t = torch.as_tensor(t)
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma: Any) -> Tensor:
        """Time t at which the noise level is sigma."""
        sigma = torch.as_tensor(sigma)
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d


@persistent_class
class VEPrecond(Precond):
    """Variance exploding (Song et al. 2021); Table 1, column VE."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, model_kwargs, img_channels)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def scalings(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        return 1, sigma, 1, (0.5 * sigma).log()


@persistent_class
class iDDPMPrecond(Precond):
    """Improved DDPM (Nichol & Dhariwal 2021); Table 1, column iDDPM + DDIM.

    The network knows M noise levels u_0 > ... > u_{M-1} (and u_M = 0). Half of its outputs are a variance that is not
    used here.
    """

    u: Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, model_kwargs, img_channels * 2)
        self.C_1 = C_1
        self.C_2 = C_2
        self.M = M

        u = torch.zeros(M + 1)  # float32 throughout: the levels that EDM's networks were made with, rounding included
        for j in range(M, 0, -1):
            ratio = (self.alpha_bar(j - 1) / self.alpha_bar(j)).clip(min=C_1)
            u[j - 1] = ((u[j] ** 2 + 1) / ratio - 1).sqrt()
        self.register_buffer("u", u)
        self.sigma_min = float(u[M - 1])
        self.sigma_max = float(u[0])

    def scalings(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        c_noise = self.M - 1 - self.round_sigma(sigma, return_index=True).to(torch.float32)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def alpha_bar(self, j: Any) -> Tensor:
        """sin^2(pi/2 * j / (M (C_2 + 1)))."""
        return (0.5 * math.pi * torch.as_tensor(j) / self.M / (self.C_2 + 1)).sin() ** 2

    def round_sigma(self, sigma: Any, return_index: bool = False) -> Tensor:
        """The nearest u_j, or its index j (int64)."""
        sigma = torch.as_tensor(sigma)
        levels = self.u.double().flip(0)  # ascending, so index k there is j = M - k
        borders = (levels[:-1] + levels[1:]) / 2
        nearest = self.M - torch.searchsorted(borders, sigma.to(levels), right=True)
        return (nearest if return_index else self.u[nearest].to(sigma.dtype)).to(sigma.device)


@persistent_class
class EDMPrecond(Precond):
    """Karras et al. 2022; Table 1, last column. Input and target of F have unit variance if the data have deviation
    sigma_data."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, model_kwargs, img_channels)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data

    def scalings(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        variance = sigma**2 + self.sigma_data**2
        c_out = sigma * self.sigma_data / variance.sqrt()
        return self.sigma_data**2 / variance, c_out, 1 / variance.sqrt(), sigma.log() / 4
