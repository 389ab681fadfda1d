"""IGULoraModel: what PEFT keeps of an adapted model, and AdaLoRA's way of stepping it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..adapt import check_mergeable, keep_layers_called, warn_of_loss
from ..adapter import SVDAdapter
from ..bank import Bank
from ..config import IGUConfig
from ..controller import StepInfo
from ..distributed import stop_averaging
from ..layers import AdaptedLayer
from ..unwrap import reshard
from .banks import Banks, peft_layers
from .config import IGULoraConfig
from .layer import BASE, IGULoraLayer, layer_of
from .registration import PREFIX
from .saved import SavedWrapper
from .stepping import Stepper

_ROOT = "base_model.model."


class IGULoraModel(BaseTuner):
    """The tuner of PEFT for igulora; made by ``get_peft_model(model, IGULoraConfig(...))``.

    Every adapter name has a bank of its own. ``igulora.find_bank``, ``Controller``, ``param_groups`` and ``compact`` take the PEFT model
    and mean its active adapter.

    Args:
        model: the base model.
        config: of the adapter, or a mapping of names to them.
        adapter_name: the first adapter's name.
    """

    prefix: str = PREFIX
    tuner_layer_cls = IGULoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING

    # -- making adapters --------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, then the bank of the new adapter. The model is what it was if a layer cannot be adapted."""
        config: IGULoraConfig = self.peft_config[adapter_name]
        if any(isinstance(module, AdaptedLayer) for module in model.modules()):
            raise ValueError(
                "expected a model without adapters of igulora.adapt, got one adapted already; call igulora.remove(model) first (after "
                "igulora.merge(model) to keep what they learned)"
            )
        self._generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        first = "igulora_banks" not in model.__dict__
        if first:
            model.igulora_banks = Banks()  # type: ignore[assignment]
        trained = [(p, p.requires_grad) for p in model.parameters()]
        self._undo: list[Callable[[], None]] = []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            for undo in reversed(self._undo):
                undo()
            for param, flag in trained:
                param.requires_grad_(flag)
            self.banks.forget_layers()
            if first:
                del model.igulora_banks
            raise
        finally:
            self._generator = None
            self._undo = []
        self.banks.forget_layers()
        SavedWrapper.adopt(model)
        keep_layers_called(model)
        self.banks.make(model, adapter_name, config, trained=not config.inference_mode)
        if not config.inference_mode:
            self.stepper.watch()

    def _create_and_replace(
        self,
        peft_config: IGULoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"expected layers that their parent calls, got {current_key!r}: nn.MultiheadAttention reads its weight directly, so that "
                f"an adapter there would do nothing; add {target_name!r} to exclude_modules"
            )
        options: dict[str, Any] = {
            "r": peft_config.rank_pattern.get(
                get_pattern_key(peft_config.rank_pattern.keys(), current_key), peft_config.initial_rank
            ),
            "scale": peft_config.scale,
            "trained": not peft_config.inference_mode,
            "nonzero": not peft_config.init_lora_weights,
            "dropout": peft_config.dropout,
            "init": peft_config.init or "orthonormal",
            "init_lambda": peft_config.init_lambda,
            "generator": self._generator,
            "recompute_inputs": peft_config.recompute_inputs,
        }
        if isinstance(target, IGULoraLayer):
            before = dict(target.igu_adapters.items()).get(adapter_name)
            self._undo.append(lambda: _put_back(target, adapter_name, before))
            target.update_layer(adapter_name, **options)
            return
        layer = layer_of(target, current_key)
        layer._active_adapter = adapter_name
        layer.train(target.training)
        layer.update_layer(adapter_name, **options)
        if adapter_name not in self.active_adapters:
            layer.igu_adapters[adapter_name].requires_grad_(
                False
            )  # a further adapter is not trained before it is chosen
        self._undo.append(lambda: setattr(parent, target_name, target))
        self._replace_module(parent, target_name, layer, target)

    def _check_new_adapter_config(self, config: IGULoraConfig) -> None:
        """PEFT's, and what the configuration itself refuses: options may have been set since it was made."""
        super()._check_new_adapter_config(config)
        config.refuse_parameters()

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Mamba's kernels read these weights themselves, as PEFT refuses them for LoRA."""
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind in _MAMBA and target_name in ("out_proj", "conv1d"):
            raise ValueError(
                f"expected layers that their parent calls, got {target_name!r} of a {kind!r} model, which is incompatible with "
                "Mamba-based models: their kernels read it; leave it out of target_modules"
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Masters are float32 (float64 over float64 weights) in any case; PEFT calls this when an adapter has its values."""
        config = self.peft_config[adapter_name]
        self.banks.make(self.model, adapter_name, config, trained=not config.inference_mode)

    # -- which adapter ------------------------------------------------------------------------------------------------------

    @property
    def banks(self) -> Banks:
        """Adapter name -> bank."""
        return self.model.igulora_banks

    @property
    def igulora_bank(self) -> Bank:
        """The active adapter's bank."""
        return self.banks.active(self.model)

    @property
    def igulora_config(self) -> IGUConfig:
        """The active adapter's options."""
        return self.banks.config(self.model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's; what begins to be trained gets its place in the flat gradient."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.banks.follow_trainable()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """PEFT's; what begins to be trained gets its place in the flat gradient."""
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self.banks.follow_trainable()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's, and the adapter's bank with it."""
        super().delete_adapter(adapter_name)
        self.banks.forget_layers()
        self.banks.pop(adapter_name, None)
        self.stepper.forget(adapter_name)

    # -- merging ------------------------------------------------------------------------------------------------------------

    def _about_to_merge(self, adapter_names: list[str] | None) -> dict[str, IGULoraLayer]:
        """The layers that merging changes, by name; raises before it changes any."""
        names = set(adapter_names or self.active_adapters)
        layers = {
            n: m for n, m in peft_layers(self.model).items() if names & m.igu_adapters.keys() - {*m.merged_adapters}
        }
        check_mergeable(self.model, layers)
        reshard(self.model)
        return layers

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's; what is lost in quantised weights is told by a ``MergeWarning`` and, layer by layer, by ``igulora.merge_errors``.

        Raises:
            ValueError: a weight cannot be written, or it is tied to another layer's. Nothing is changed then.
        """
        layers = self._about_to_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        warn_of_loss(layers)

    def unmerge_adapter(self) -> None:
        """PEFT's; what FSDP2 keeps gathered after a forward is put back first, as a change of it would be lost."""
        reshard(self.model)
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layers = self._about_to_merge(adapter_names) if merge else {}
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        stop_averaging(model)
        del model.igulora_banks
        warn_of_loss(layers, stacklevel=4)
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported, as for AdaLoRA.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} does not support add_weighted_adapter method: directions of two adapters do not add up; "
            "export both as LoRA (igulora.export_peft) and combine those"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names`` of a forward or of ``generate`` to the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "expected a model in evaluation mode, got one in training: Cannot pass `adapter_names` when the model is in training mode"
            )
        known = {name for layer in peft_layers(self.model).values() for name in layer.igu_adapters} | {BASE}
        if unknown := sorted(set(names) - known):
            raise ValueError(
                f"expected adapter_names out of {', '.join(sorted(known))}, got non-existing adapter(s): {', '.join(unknown)}"
            )
        rows = next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim), len(names))
        if rows != len(names):
            raise ValueError(
                f"expected one of adapter_names per row, got {len(names)} names for {rows} rows; repeat or cut the list"
            )
        repeated = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        encoder = (
            self.model.get_encoder()
            if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            else None
        )
        of_encoder = (
            set() if encoder is None else {id(m) for m in encoder.modules()}
        )  # sees each sequence once, whatever the beams

        def pass_names(module: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return inputs, {**options, "adapter_names": names if id(module) in of_encoder else repeated}

        handles = [
            module.register_forward_pre_hook(pass_names, with_kwargs=True)
            for module in self.model.modules()
            if isinstance(module, (IGULoraLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- AdaLoRA's loop -----------------------------------------------------------------------------------------------------

    @property
    def stepper(self) -> Stepper:
        """What :meth:`update_and_allocate` steps with."""
        if "_stepper" not in self.__dict__:
            self._stepper = Stepper(self)
        return self._stepper

    def update_and_allocate(self, global_step: int) -> StepInfo:
        """AdaLoRA's call after ``optimizer.step()`` and before ``zero_grad()``, for methods that need the training gradient only.

        The orthogonality gradient is added just before the optimizer's step, whichever optimizer of PyTorch holds the parameters.

        Args:
            global_step: number of the step; one more than at the last call.

        Raises:
            ValueError: the estimator needs passes of its own, a step was left out or counted twice, or the gradients are gone.
        """
        return self.stepper.step(global_step)

    def __getstate__(self) -> dict[str, Any]:
        """A copy steps by itself: it starts without what steps the original."""
        return {key: value for key, value in self.__dict__.items() if key != "_stepper"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.stepper.watch()

    # -- state dicts --------------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's, after the adapter got as many rows as the checkpoint has: compaction leaves each module a rank of its own."""
        ranks = {
            key.removeprefix(_ROOT).removesuffix(_RANK_KEY): value.shape[0]
            for key, value in state_dict.items()
            if key.endswith(_RANK_KEY)
        }
        changed = False
        for name, layer in peft_layers(model).items():
            if adapter_name not in layer.igu_adapters:
                continue
            adapter = layer.igu_adapters[adapter_name]
            rank = ranks.get(name, adapter.r)
            if rank != adapter.r:
                _resize(adapter, rank)
                changed = True
        bank = getattr(model, "igulora_banks", {}).get(adapter_name)
        if bank is not None:
            if changed:
                bank.refresh()
            bank.forget_live()
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


_RANK_KEY = f".{PREFIX}adapters.lora_E"
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def _put_back(layer: IGULoraLayer, name: str, adapter: Any) -> None:
    """``adapter`` under its name again, or none."""
    layer.igu_adapters.pop(name)
    if adapter is not None:
        layer.igu_adapters[name] = adapter


@torch.no_grad()
def _resize(adapter: SVDAdapter, rank: int) -> None:
    """Room for ``rank`` rows; the parameters stay the same objects, what they held is gone."""
    for name in ("lora_P", "lora_E", "lora_Q"):
        param = getattr(adapter, name)
        param.grad = None
        param.data = param.new_zeros((rank, *param.shape[1:]))
    adapter.mask = adapter.mask.new_ones(rank)
    adapter.context.epoch += 1
