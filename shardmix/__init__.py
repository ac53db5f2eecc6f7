"""Merge the weights of neural networks, streaming, in as little memory as you give it.

    import shardmix

    report = shardmix.merge({"org/base": 0.6, "./tuned": 0.4}, "merged", max_memory="2GiB")

`merge` merges, `plan_merge` shows beforehand what a merge would do, `inspect` shows one checkpoint.
`mix_models`, `mix_models_with_data` and `mix_models_by_layers` are LM-Cocktail's;
`shardmix.scoring` computes weights from examples. Names are loaded on first use, so that importing
shardmix costs nothing.
"""

from typing import TYPE_CHECKING

from shardmix import _lazy
from shardmix._version import __version__ as __version__

if TYPE_CHECKING:
    from shardmix.api import convert as convert
    from shardmix.api import extract as extract
    from shardmix.api import inspect as inspect
    from shardmix.api import merge as merge
    from shardmix.api import plan_merge as plan_merge
    from shardmix.api import report_plan as report_plan
    from shardmix.errors import BudgetError as BudgetError
    from shardmix.errors import DeviceError as DeviceError
    from shardmix.errors import MergeCancelled as MergeCancelled
    from shardmix.errors import MismatchError as MismatchError
    from shardmix.errors import NonfiniteError as NonfiniteError
    from shardmix.errors import OutputError as OutputError
    from shardmix.errors import RecipeError as RecipeError
    from shardmix.errors import ShardmixError as ShardmixError
    from shardmix.errors import SourceError as SourceError
    from shardmix.execute.progress import ProgressEvent as ProgressEvent
    from shardmix.lm_cocktail import mix_models as mix_models
    from shardmix.lm_cocktail import mix_models_by_layers as mix_models_by_layers
    from shardmix.lm_cocktail import mix_models_with_data as mix_models_with_data
    from shardmix.options import MergeOptions as MergeOptions
    from shardmix.plan.merge_plan import MergePlan as MergePlan
    from shardmix.recipe import Recipe as Recipe
    from shardmix.recipe import RecipeModel as RecipeModel
    from shardmix.reports.merge_report import MergeReport as MergeReport
    from shardmix.reports.model_report import ModelReport as ModelReport
    from shardmix.reports.plan_report import PlanReport as PlanReport
    from shardmix.score_and_merge import merge_by_examples as merge_by_examples
    from shardmix.verification.status import StatusReport as StatusReport
    from shardmix.verification.status import status as status
    from shardmix.verification.verify import VerifyReport as VerifyReport
    from shardmix.verification.verify import verify as verify

_HOME = {
    "merge": "api",
    "convert": "api",
    "extract": "api",
    "plan_merge": "api",
    "inspect": "api",
    "report_plan": "api",
    "status": "verification.status",
    "verify": "verification.verify",
    "mix_models": "lm_cocktail",
    "mix_models_by_layers": "lm_cocktail",
    "mix_models_with_data": "lm_cocktail",
    "merge_by_examples": "score_and_merge",
    "MergeOptions": "options",
    "MergePlan": "plan.merge_plan",
    "MergeReport": "reports.merge_report",
    "ModelReport": "reports.model_report",
    "PlanReport": "reports.plan_report",
    "ProgressEvent": "execute.progress",
    "StatusReport": "verification.status",
    "VerifyReport": "verification.verify",
    "Recipe": "recipe",
    "RecipeModel": "recipe",
    "ShardmixError": "errors",
    "RecipeError": "errors",
    "SourceError": "errors",
    "MismatchError": "errors",
    "BudgetError": "errors",
    "DeviceError": "errors",
    "NonfiniteError": "errors",
    "OutputError": "errors",
    "MergeCancelled": "errors",
}

__all__ = ["__version__", *_HOME]


__getattr__ = _lazy.loader(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
