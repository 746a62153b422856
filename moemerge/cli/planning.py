"""`moemerge plan`: what a merge would do."""

from typing import TYPE_CHECKING

from moemerge.cli.console import console_session, print_json, stdout
from moemerge.cli.editing import plan_of, print_or_dump_edit
from moemerge.cli.grouping import grouped
from moemerge.cli.mistakes import check_arguments
from moemerge.cli.options import Config, ModelOptions, ShardSize, VerboseOptions
from moemerge.cli.plan_request import PlanRequest, edit_in, plan_from, shard_bytes

if TYPE_CHECKING:
    from moemerge.planning.plan import MergePlan


@grouped
def show_plan(
    config: Config,
    *,
    max_shard_size: ShardSize = None,
    models: ModelOptions,
    messages: VerboseOptions,
) -> None:
    """Show what a merge would do; nothing is written.

    That is the output family, parameters, disk, memory, and where each part comes from.

    Examples:
        moemerge plan merge.yaml
        moemerge plan merge.yaml --for vllm
        moemerge plan merge.yaml --json | jq .output_bytes
    """
    quiet = messages.quiet
    with console_session(
        quiet=quiet, verbose=messages.verbose, debug=messages.debug, cache_dir=models.cache_dir
    ) as console:
        from moemerge.planning.options import PlanOptions

        check_arguments(config)
        request = PlanRequest(config, models.allow_identical_experts, models.engine, max_shard_size=max_shard_size)
        if edit := edit_in(console, request, quiet=quiet):
            edit_options = PlanOptions(shard_bytes(max_shard_size))
            print_or_dump_edit(plan_of(console, edit, edit_options, quiet=quiet), json=messages.json)
            return
        plan = plan_from(console, request, PlanOptions(weights="stream"), quiet=quiet)
        print_or_dump_plan(plan, json=messages.json)


def print_or_dump_plan(plan: "MergePlan", *, json: bool) -> None:
    """Print a plan, as text or as JSON."""
    from moemerge.cli.render import plan_facts, print_plan

    if json:
        print_json(plan_facts(plan))
    else:
        print_plan(stdout(), plan)
