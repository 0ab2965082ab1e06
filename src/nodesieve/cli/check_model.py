"""`nodesieve check-model`: can this model be gated?"""

from __future__ import annotations

import click

from nodesieve.cli.common import trust_remote_code_option
from nodesieve.config import DtypeName, choices
from nodesieve.errors import UserError


@click.command("check-model", short_help="Check that gates fit a model, and list its levels.")
@click.argument("model")
@click.option("--revision", help="branch, tag or commit on the hub")
@click.option("--device", default="auto", show_default=True, help="torch device")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(choices(DtypeName)), help="dtype of the frozen model")
@trust_remote_code_option
def command(model: str, revision: str | None, device: str, dtype: str, trust_remote_code: bool) -> None:
    """Load MODEL, run it with all gates open, closed and in between, and say whether everything is as it must be."""
    from nodesieve.architectures import MissingModule, is_known
    from nodesieve.console import print_levels
    from nodesieve.gated_model import GatedModel
    from nodesieve.models import load_model
    from nodesieve.verify import gate, verify

    loaded = load_model(model, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        gated = GatedModel(loaded.model) if is_known(loaded.model) else gate(loaded.model)  # `gate` ends at the first check that fails
    except MissingModule:
        gated = gate(loaded.model)
    print_levels(gated.architecture, title=f"{model} ({loaded.model.config.model_type})")
    failed = []
    for check in verify(gated):
        print(f"{'ok    ' if check.passed else 'FAILED'} {check.name}{'' if check.passed else ': ' + check.detail}")
        failed += [] if check.passed else [check.name]
    if failed:
        raise UserError(f"{len(failed)} {'check' if len(failed) == 1 else 'checks'} failed; this model cannot be used as it is")
