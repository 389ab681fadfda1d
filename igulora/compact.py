"""Compaction: dead rows leave parameters, optimizer and score states; outputs stay what they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .bank import Bank, find_bank, find_config
from .controller import Controller


def _check_fixed(bank: Bank) -> None:
    returning = int(((bank.mask > 0) & (bank.live == 0)).sum())
    if returning:
        raise ValueError(
            f'expected fixed ranks, got {returning} pruned triplets that may still grow back (prune="soft" before the final phase); '
            'compact after step total_steps - t_final, or use prune="hard"'
        )
    if any(layer.merged for layer in bank.layers):
        raise ValueError("expected an unmerged model, got a merged one; call igulora.unmerge(model) first")


@torch.no_grad()
def compact(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, controller: Controller | None = None
) -> nn.Module:
    """Drop the rows of masked triplets from the adapters; returns the model.

    Parameters keep their identity and shrink from (r, ...) to (live, ...), so an optimizer goes on with them; its per-element states and
    the controller's score states shrink alike. Outputs and the course of training do not change: a masked triplet added nothing and
    received no gradient. (The orthogonality penalty is taken over stored rows: it no longer sees the dropped ones.)
    Outputs kept from earlier passes must be detached: a live graph makes PyTorch expect gradients of the old shapes.

    Args:
        model: adapted; its ranks fixed (``prune="hard"``, or the final phase).
        optimizer: shrinks the states of the adapter parameters it holds.
        controller: shrinks score states.

    Raises:
        ValueError: pruned triplets may still grow back, the model is merged, or the controller is another model's. Nothing is changed.
    """
    bank = find_bank(model)
    _check_fixed(bank)
    if controller is not None and controller.bank is not bank:
        raise ValueError("expected the controller of this model, got one of another model")
    if controller is None and find_config(model).bidirectional and bank.context.controlled:
        raise ValueError(
            "expected the controller of a run whose matrices may gain triplets, got none; call "
            "igulora.compact(model, optimizer, controller) when its ranks are final"
        )
    if controller is not None and controller.config.bidirectional and controller.phase != "final":
        raise ValueError(
            f"expected fixed ranks, got step {controller.global_step} of a run whose matrices may still gain triplets: masked rows are "
            f"kept for those. Compact after step {controller.config.prunes_until}"
        )
    bank.bind_grads()  # after zero_grad(set_to_none=True) the flat gradient still holds the last step's
    keep = [_rows_to_keep(layer.mask, layer.blocks) for layer in bank.layers]
    kept = torch.cat([rows + start for rows, start in zip(keep, bank.starts[:-1], strict=True)] or [bank.layer_index])
    live = bank.live[kept]
    refill = _refiller(bank, keep)
    buffers: list[tuple[object, str, Callable[[], Tensor]]] = []
    if controller is not None:
        owners: list[tuple[object, str]] = [(controller.importance, "mean"), (controller.importance, "deviation")]
        if controller.passes.absolute is not None:
            owners.append((controller.passes, "absolute"))
        buffers = [(owner, name, refill(getattr(owner, name))) for owner, name in owners]
        controller.importance.terms = controller.importance.terms[:, kept]
        controller.importance.stats = None
    path = refill(bank._path.detach()) if bank._path is not None else None
    grad = refill(bank.grad)
    for layer, rows in zip(bank.layers, keep, strict=True):
        for name in ("lora_P", "lora_E", "lora_Q"):
            _shrink(getattr(layer, name), rows, optimizer)
        layer.mask = layer.mask[rows]
    bank.live, bank._path = live, None
    bank.repack()
    bank.grad.copy_(grad())
    if path is not None:
        bank.path.copy_(path())
    for owner, name, rebuilt in buffers:
        setattr(owner, name, rebuilt())
    return model


def _rows_to_keep(mask: Tensor, blocks: int) -> Tensor:
    """Numbers of the live rows; of a block-diagonal layer as many in every block, masked ones where it has fewer."""
    if blocks == 1:
        return torch.nonzero(mask).flatten()
    of_block = mask.view(blocks, -1)
    count = int(of_block.sum(1).max())
    rows = torch.argsort(of_block, dim=1, descending=True, stable=True)[:, :count].sort(1).values
    return (rows + torch.arange(blocks, device=mask.device).unsqueeze(1) * of_block.shape[1]).flatten()


def _refiller(bank: Bank, keep: list[Tensor]) -> Callable[[Tensor], Callable[[], Tensor]]:
    """Split a flat buffer into the kept rows of its matrices now; put them into a buffer of the bank's layout when called later."""
    slot = {name: i for i, name in enumerate(bank.names)}

    def take(flat: Tensor) -> Callable[[], Tensor]:
        parts = {key: view[keep[slot[key[0]]]].clone() for key, view in bank.matrix_views(flat).items()}

        def put() -> Tensor:
            fresh = torch.zeros_like(bank.weight)
            for key, view in bank.matrix_views(fresh).items():
                view.copy_(parts[key])
            return fresh

        return put

    return take


def _shrink(param: nn.Parameter, rows: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    before = param.shape
    param.grad = None
    param.data = param.data[rows].clone()
    if optimizer is None or param not in optimizer.state:
        return
    state = optimizer.state[param]
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == before:
            state[key] = value[rows].clone()
