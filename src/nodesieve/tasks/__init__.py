"""Tasks: behaviours as prompts with answers. One file a built-in task, one reader a file format; to add a task, add its file and a row here."""

from __future__ import annotations

from nodesieve.tasks.base import Builtin
from nodesieve.tasks.capital_city import CAPITAL_CITY
from nodesieve.tasks.docstring import DOCSTRING
from nodesieve.tasks.gendered_pronoun import GENDERED_PRONOUN
from nodesieve.tasks.greater_than import GREATER_THAN
from nodesieve.tasks.induction import INDUCTION
from nodesieve.tasks.ioi import IOI
from nodesieve.tasks.subject_verb_agreement import SUBJECT_VERB_AGREEMENT

BUILTINS: dict[str, Builtin] = {
    builtin.name: builtin for builtin in (IOI, GREATER_THAN, GENDERED_PRONOUN, SUBJECT_VERB_AGREEMENT, DOCSTRING, INDUCTION, CAPITAL_CITY)
}
