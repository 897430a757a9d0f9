"""Installs the wheels of launch/gpu_proof_kit.sh on a machine without network, into a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from grpo_mega.types import UserError
from tools.wheel_parts import LIST, join


def install_kit(wheels: Path, site: Path) -> list[str]:
    """Install every wheel of a folder into `site`, with neither an index nor dependencies, and return their names.

    Wheels that are in parts are joined first. The Python environment itself is unchanged: put `site` on PYTHONPATH.

    Raises:
        UserError: there is no wheel, a part is missing, or pip rejects a wheel.
    """
    if (wheels / LIST).is_file():
        problems, _ = join(wheels, remove=False)
        if problems:
            raise UserError(f"--wheels={wheels}: {'; '.join(problems)}", remedy="copy every file of the kit again")
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise UserError(f"--wheels={wheels}: must hold wheels", remedy="make them with launch/gpu_proof_kit.sh")
    # megatron-core states a newer Python than its wheels need; a wheel for another Python is rejected by its name
    options = ["--no-index", "--find-links", str(wheels), "--no-deps", "--ignore-requires-python"]
    quiet = ["--quiet", "--no-cache-dir", "--no-compile", "--disable-pip-version-check", "--root-user-action=ignore"]
    command = [sys.executable, "-m", "pip", "install", *options, *quiet, "--target", str(site), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise UserError(
            f"--wheels={wheels}: pip could not install them ({lines[-1] if lines else 'no message'})",
            remedy=f"make them for Python {sys.version_info[0]}.{sys.version_info[1]} with launch/gpu_proof_kit.sh",
        )
    return [file.name for file in files]
