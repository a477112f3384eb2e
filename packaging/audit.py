"""Looks every installed package up in OSV's list of known vulnerabilities, and never takes no answer for good news.

    python packaging/audit.py [options of pip-audit]

Exit code 0: nothing known. 1: something is known, a line each. 2: the service gave no answer, nothing was looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# pip-audit's default service passes over packages that it does not find, behind a mirror all of them, and ends well
_PIP_AUDIT = [
    *(sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", "--skip-editable"),
    *("--progress-spinner", "off", "--format", "json", "--desc", "off"),
]


def main(options: Sequence[str] = ()) -> int:
    """Runs pip-audit over this interpreter's environment; writes what it found to stdout, a failure to stderr."""
    done = subprocess.run([*_PIP_AUDIT, *options], capture_output=True, text=True, check=False)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        sys.stderr.write(f"audit: no answer from the vulnerability service, nothing was looked up: {reason}\n")
        return 2
    for package in packages:
        for known in package.get("vulns", []):
            mended = ", ".join(known["fix_versions"]) or "no version"
            sys.stdout.write(f"{package['name']} {package['version']}: {known['id']}, mended in {mended}\n")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = sum(len(package.get("vulns", [])) for package in packages)
    sys.stdout.write(f"{len(packages) - len(skipped)} packages looked up, {found} vulnerabilities known\n")
    if skipped:
        sys.stdout.write(f"not looked up: {', '.join(skipped)}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
