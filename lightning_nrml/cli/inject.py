"""``nrml inject``: write the noisy train labels of a config into a table; no model or trainer is built."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_nrml.cli.errors import UserError
from lightning_nrml.cli.recipes import config_arguments, expand_configs

USAGE = "nrml inject --config NAME|FILE --out noisy.csv [--data.init_args.KEY VALUE ...] [--force]"


def main(args: Sequence[str]) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="nrml inject",
        usage=USAGE,
        description="Write the noisy train labels that the data section of a config gives, as a table for "
        "'noise' (.csv or .parquet), and a summary with hash and counts per class beside it (.json).",
    )
    parser.add_argument("--config", action="append", required=True, help="recipe or file; later ones win")
    parser.add_argument("--out", required=True, help="the table")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parsed, rest = parser.parse_known_args(list(args))
    # heavy: jsonargparse, Lightning and torch
    from lightning_nrml.cli.app import load_classes, without_known_deprecations
    from lightning_nrml.cli.explain import explain, user_error

    words = ["inject", *(word for name in parsed.config for word in ("--config", name)), *rest]
    try:
        words = expand_configs(words)
        load_classes()
        with without_known_deprecations():
            data = build_data([Path(value) for _, value in config_arguments(words)], rest)
        from lightning_nrml.data.inject import write_noisy_labels

        show(write_noisy_labels(data, parsed.out, parsed.force))
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        print(f"nrml: {explain(told, words)}", file=sys.stderr)
        return 2
    return 0


def build_data(configs: Sequence[Path], overrides: Sequence[str]) -> Any:
    """The datamodule of the ``data`` sections of ``configs`` under ``--data.KEY VALUE`` overrides.

    Raises:
        UserError: an unknown key or class, no data section, or an option that is not about data.
    """
    from jsonargparse import ArgumentParser
    from omegaconf import OmegaConf

    from lightning_nrml.cli.check import check_tree, load_yaml
    from lightning_nrml.data import NRMLDataModule

    whole: dict[str, Any] = {}
    for config in configs:
        tree = load_yaml(config)
        problem = next(check_tree({"data": tree.get("data", {})}), None)
        if problem is not None:
            raise UserError(f"{config}: {problem}")
        whole = _laid_over(whole, tree)
    if "data" not in whole:
        raise UserError(f"{configs[-1]} has no data section; nrml inject needs one.")
    for word in overrides:
        if word.startswith("-") and not word.startswith("--data"):
            raise UserError(f"{word}: nrml inject takes --config, --out, --force and --data keys only.")
    tree = OmegaConf.create(whole)
    data = OmegaConf.to_container(tree.data, resolve=True) if isinstance(whole["data"], dict) else tree.data
    parser = ArgumentParser(exit_on_error=False, prog="nrml inject")
    parser.add_subclass_arguments(NRMLDataModule, "data", required=True)
    parser.set_defaults({"data": data})
    return parser.instantiate_classes(parser.parse_args(list(overrides))).data


def _laid_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``; arguments of another class are not kept."""
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            same = value.get("class_path", old.get("class_path")) == old.get("class_path")
            value = _laid_over(old, value) if same else value
        out[key] = value
    return out


def show(summary: dict[str, Any]) -> None:
    """Print what was written."""
    share = 100 * summary["rate_realised"]
    said = "wrong" if summary["truth_known"] else "changed"
    print(
        f"Wrote {summary['table']}: {summary['num_train']} images, {summary['num_classes']} classes, "
        f"{summary['wrong']} labels {said} ({share:.2f} %), hash {summary['hash']}"
    )
    width = max(len(str(row["name"])) for row in summary["classes"])
    keys = ("clean", "given", "removed", "added")
    print(f"{'':<{width}} " + " ".join(f"{key:>8}" for key in keys))
    for row in summary["classes"]:
        print(f"{row['name']!s:<{width}} " + " ".join(f"{row[key]:>8}" for key in keys))
