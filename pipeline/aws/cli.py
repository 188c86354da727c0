"""`spaceport aws`: the stack, its images, and scenes that are made there."""

from __future__ import annotations

from collections.abc import Callable

import typer

from spaceport_gs.pipeline.aws.commands import batches, costs, scenes, stack, watching
from spaceport_gs.pipeline.aws.commands.common import require_packages

COMMANDS: dict[str, Callable[..., None]] = {
    "deploy": stack.deploy_command,
    "destroy": stack.destroy_command,
    "push": stack.push_command,
    "doctor": stack.doctor_command,
    "submit": scenes.submit_command,
    "watch": watching.watch_command,
    "status": watching.status_command,
    "logs": watching.logs_command,
    "stop": scenes.stop_command,
    "fetch": scenes.fetch_command,
    "link": scenes.link_command,
    "retry": scenes.retry_command,
    "batch": batches.batch_command,
    "cost": costs.cost_command,
}
"""In the order in which `--help` shows them."""

app = typer.Typer(
    name="aws",
    help="Scenes made in an account of Amazon's cloud: a stack, its images, jobs. Needs the package's extra: aws.",
    invoke_without_command=True,
    add_completion=False,
)
for name, command in COMMANDS.items():
    app.command(name=name)(command)


@app.callback()
def _common(context: typer.Context) -> None:
    require_packages()
    if context.invoked_subcommand is None:
        print(context.get_help())
