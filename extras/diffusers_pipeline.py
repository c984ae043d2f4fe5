"""A distilled network as a Hugging Face diffusers pipeline. Needs diffusers: pip install diffusers

    pipe = EDMStudentPipeline.from_network("assets/digits-student.pkl").to("cuda")
    images = pipe(batch_size=16, generator=torch.Generator().manual_seed(0)).images
    pipe.save_pretrained("folder")
    pipe = EDMStudentPipeline.from_pretrained("folder")

A saved folder is diffusers' own format: weights in safetensors, everything else in JSON. Loading it needs this module,
because the network's class is this project's.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from formats.building import PRECONDS, SETTINGS
from formats.network_files import load_network
from training.grids import NoiseGrid
from training.pictures import to_uint8
from training.samplers import grid_sampler
from training.training_loop import NETWORKS

Options = dict[str, Any]


class EDMStudent(ModelMixin, ConfigMixin):
    """A network (class, constructor's arguments, attributes changed since) and the noise levels of its grid."""

    @register_to_config
    def __init__(
        self, class_name: str, arguments: Options, settings: Options, levels: list[float], solver: str = "euler"
    ) -> None:
        super().__init__()
        if class_name not in PRECONDS:
            raise ValueError(f"{class_name} is none of {', '.join(PRECONDS)}")
        self.net = NETWORKS[class_name](**arguments)
        for name in settings.keys() & set(SETTINGS):
            setattr(self.net, name, settings[name])
        self.grid = NoiseGrid(tuple(levels))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The denoiser D(x; sigma, class): float32 [N, C, H, W]."""
        images: Tensor = self.net(x, sigma, class_labels)
        return images


class EDMStudentPipeline(DiffusionPipeline):
    """Images in the few steps that a student was distilled for."""

    def __init__(self, student: EDMStudent) -> None:
        super().__init__()
        self.register_modules(student=student)

    @classmethod
    def from_network(cls, path_or_url: str | os.PathLike[str]) -> EDMStudentPipeline:
        """From a network file of this project. Raises UserError for a bad file, ValueError for an undistilled one."""
        network = load_network(path_or_url)
        if network.sampling is None:
            raise ValueError(f"{network.source} is undistilled: it has no noise grid that a pipeline could follow")
        if network.has_label_vectors:
            raise ValueError(f"{network.source} was trained with label vectors; use training.sampling.sample")
        net = network.net
        names = ("img_resolution", "img_channels", "label_dim")
        arguments = {**dict(zip(names, net.init_args, strict=False)), **net.init_kwargs}
        settings = {name: getattr(net, name) for name in SETTINGS if isinstance(getattr(net, name, None), (int, float))}
        levels, solver = list(network.sampling.grid.levels), network.sampling.solver
        student = EDMStudent(type(net).__name__, arguments, settings, levels, solver)
        student.net.load_state_dict(net.state_dict())
        return cls(student.eval().requires_grad_(False))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        class_labels: int | list[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Makes `batch_size` images.

        class_labels  one class for all or one each, for a network with classes; None: classes are drawn
        output_type   'pil', 'np' (float32 [N, H, W, C] in [0, 1]) or 'pt' (float32 [N, C, H, W] in [-1, 1])
        """
        net, device, labels = self.student.net, self._execution_device, None
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is none of 'pil', 'np', 'pt'")
        if class_labels is not None and not net.label_dim:
            raise ValueError("this network has no classes")
        shape = (batch_size, net.img_channels, net.img_resolution, net.img_resolution)
        latents = randn_tensor(shape, generator=generator, device=device)
        if net.label_dim:
            chosen: Any = class_labels
            if chosen is None:
                one = generator[0] if isinstance(generator, list) else generator
                where = one.device if one is not None else device
                chosen = torch.randint(net.label_dim, [batch_size], generator=one, device=where)
            labels = torch.eye(net.label_dim, device=device)[torch.as_tensor(chosen, device=device).expand(batch_size)]
        raw = grid_sampler(net, latents, self.student.grid.levels, self.student.config.solver, labels)
        images: Any = raw.float()
        if output_type == "np":
            images = ((images + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        elif output_type == "pil":
            images = self.numpy_to_pil(to_uint8(raw).permute(0, 2, 3, 1).cpu().numpy() / 255)  # with EDM's rounding
        return ImagePipelineOutput(images=images) if return_dict else (images,)
