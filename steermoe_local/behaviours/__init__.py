"""The behaviours that ship with the package: their pairs, held-out prompts, facts, and neutral questions.

Imports: _util, errors, models, pairs.
Public: `BuiltinBehaviour`, `behaviours`, `behaviour`, `neutral_questions`.
"""

from .builtin import BuiltinBehaviour as BuiltinBehaviour
from .builtin import behaviour as behaviour
from .builtin import behaviours as behaviours
from .builtin import neutral_questions as neutral_questions
