"""What noise callbacks hang on a module: its chain of filters, and what earlier fits left there."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from lightning_nrml.filters.chain import FilterChain


def chain_of(pl_module: LightningModule) -> FilterChain:
    """The module's filter chain; made on first use for modules that do not extend ours."""
    chain = getattr(pl_module, "filters", None)
    if chain is None:
        chain = FilterChain()
        pl_module.filters = chain
    if not isinstance(chain, FilterChain):
        raise TypeError(
            f"{type(pl_module).__name__}.filters is a {type(chain).__name__}; noise callbacks need that "
            "name: call your attribute otherwise."
        )
    return chain


def drop_leftovers(pl_module: LightningModule, chain: FilterChain, names: list[str]) -> None:
    """What the callbacks of an earlier fit left on the module and nobody owns now."""
    for name in [n for n in chain if n not in names and n not in chain.mode]:
        del chain[name]
    for name in ("feature_bank", "filter_teacher"):
        if getattr(pl_module, name, None) is not None:
            delattr(pl_module, name)
