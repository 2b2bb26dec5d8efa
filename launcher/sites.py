"""Site files: what one cluster is like, said once and laid under every job file."""

from __future__ import annotations

import os
from collections.abc import Mapping

from launcher.errors import Problem, UserError
from launcher.yamldoc import suggest

SUFFIX = ".yaml"


def folder(environ: Mapping[str, str]) -> str:
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", ""), ".config")  # noqa: PTH118 - pathlib starts slowly
    return os.path.join(base, "dslaunch")  # noqa: PTH118


def known(environ: Mapping[str, str]) -> dict[str, str]:
    """Path by name of what lies in ~/.config/dslaunch/sites: {"booster": ".../sites/booster.yaml"}."""
    place = os.path.join(folder(environ), "sites")  # noqa: PTH118
    try:
        names = sorted(os.listdir(place))  # noqa: PTH208
    except OSError:
        return {}
    return {name.removesuffix(SUFFIX): os.path.join(place, name) for name in names if name.endswith(SUFFIX)}  # noqa: PTH118


def empty(path: str) -> UserError:
    hint = "site: {backend: slurm} in it; dslaunch probe --site slurm -o FILE writes what Slurm tells"
    return UserError(Problem(f"{os.path.basename(path)} is empty: it says nothing of its site", hint, where=path))  # noqa: PTH119


def silent(path: str) -> UserError:
    """A site without `site.backend`."""
    message = f"{os.path.basename(path)} does not say where its jobs go"  # noqa: PTH119
    return UserError(Problem(message, "add site: {backend: slurm}, or kubernetes, or local", where=path))


def path(asked: str | None, environ: Mapping[str, str]) -> str | None:
    """The file behind `--site booster` or `--site ./booster.yaml`, DSLAUNCH_SITE, or the default site.yaml.

    Raises UserError for a name that nothing is known of.
    """
    asked = asked or environ.get("DSLAUNCH_SITE")
    if not asked:
        usual = os.path.join(folder(environ), "site.yaml")  # noqa: PTH118
        return usual if os.path.isfile(usual) else None  # noqa: PTH113
    if "/" in asked or asked.endswith((SUFFIX, ".yml")):
        return asked
    names = known(environ)
    if asked not in names:
        where = os.path.join(folder(environ), "sites")  # noqa: PTH118
        hint = suggest(asked, names) if names else f"dslaunch probe writes one: {where}/{asked}{SUFFIX}"
        raise UserError(Problem(f"no site {asked} in {where}", hint))
    return names[asked]
