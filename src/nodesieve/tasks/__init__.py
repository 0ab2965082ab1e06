"""Tasks: behaviours as prompts with answers. One file a built-in task, one reader a file format; to add a task, add its file and a row here."""

from __future__ import annotations

from nodesieve.tasks.base import Builtin
from nodesieve.tasks.gendered_pronoun import GENDERED_PRONOUN
from nodesieve.tasks.greater_than import GREATER_THAN
from nodesieve.tasks.ioi import IOI

BUILTINS: dict[str, Builtin] = {builtin.name: builtin for builtin in (IOI, GREATER_THAN, GENDERED_PRONOUN)}
