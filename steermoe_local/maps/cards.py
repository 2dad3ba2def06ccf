"""The card of an expert map: its README.md on the Hugging Face hub."""

from __future__ import annotations

import re
import shlex

from .._util.visible import visible
from ..errors import UsageError
from ..identity import UNKNOWN_ROUTER
from .effects import ACTIONS, ATTRIBUTE
from .expert_map import ExpertMap
from .map_phases import phase_words

N_TOP = 10

_TEMPLATE = """\
---
license: {{ license | yaml }}
base_model: {{ base_model | yaml }}
base_model_relation: adapter
tags:
- steermoe
- mixture-of-experts
- steering
- gguf
steermoe:
  behaviour: {{ map.behaviour | yaml }}
  architecture: {{ model.architecture | yaml }}
  n_layer: {{ model.n_layer }}
  n_expert: {{ model.n_expert }}
  n_expert_used: {{ model.n_expert_used }}
  router_sha256: {{ router | yaml }}
  map_sha256: {{ map.sha256 | yaml }}
---

# Expert map: {{ map.behaviour | line }}, {{ base_model | line }}

Which experts of `{{ base_model | line }}` go with a behaviour: a risk
difference (RD) for each expert of each layer, made with steermoe-local by the method of
[arXiv 2509.09660](https://arxiv.org/abs/2509.09660). The file steers the model's GGUF under llama.cpp, in every
quantization; it holds no weights and no text of the pairs.

| | |
| --- | --- |
| base model | {{ base_model | line }} |
| architecture | {{ model.architecture | line }}: {{ model.n_layer }} layers, {{ model.n_expert }} experts, k = \
{{ model.n_expert_used }} |
| router SHA-256 | {{ "`" ~ router ~ "`" if router else "not known: imported, use with `--force`" }} |
| behaviour | {{ map.behaviour | line }} |
{% if map.positive %}
| RD > 0 | {{ map.positive | line }} |
{% endif %}
{% if map.negative %}
| RD < 0 | {{ map.negative | line }} |
{% endif %}
| pairs | {{ map.n_pairs or "not known" }} |
| pairs SHA-256 | {{ digests or "not known" }} |
| target tokens | {{ tokens or "not known" }}{{ ": " ~ phase if phase }} |
{% if confidence %}
| differs from shuffled pairs | {{ "yes (needed, not enough)" if confidence.differs_from_shuffled else "**no**" }}, \
p = {{ "%.3g" | format(confidence.max_rd.p) }} by the largest RD, {{ "%.3g" | format(confidence.sum_top.p) }} by the \
sum of the top {{ confidence.top_n }} |
| split-half stability | Spearman {{ "%.2f" | format(confidence.split_half.spearman) }}, \
top-{{ confidence.top_n }} overlap {{ "%.2f" | format(confidence.split_half.overlap) }} |
{% endif %}
| made | {{ map.created | line }}, {{ map.tool | line }} |
| map SHA-256 | `{{ map.sha256 }}` |
| licence | {{ license | line }} |

## Recommended choice

{% if recommended %}
`{{ recommended.choice_words }}`{{ ": " ~ (recommended.words | line) if recommended.words }}\
{{ " (" ~ (recommended.task | line) ~ ")" if recommended.task }}.
It is what steers where no numbers of experts are given.
{% if recommended.command %}
Measured by `{{ recommended.command | line }}`.
{% endif %}
{% else %}
None: nobody measured one. How many experts to promote and suppress is for you to find (`steermoe tune`).
{% endif %}

## First experts by |RD|

| layer | expert | RD |{% if rates %} p1 | p2 |{% endif %}

| --- | --- | --- |{% if rates %} --- | --- |{% endif %}

{% for layer, expert, rd in top %}
| {{ layer }} | {{ expert }} | {{ "%+.4f" | format(rd) }} |\
{% if rates %}{% for side in rates %} {{ "%.4f" | format(side[layer, expert]) }} |{% endfor %}{% endif %}

{% endfor %}

RD = p1 - p2, the shares of target tokens that activated the expert on either side. In all, {{ n_plus }} experts have
RD > 0 and {{ n_minus }} RD < 0.

## Effects

{% if effects %}
What promoting or suppressing one expert did to the margin of the positive answer over the negative one, by
interventions on {{ facts.n_items }} \
{{ "pairs" if facts.response == "pairs" else "items of " ~ (facts.response | line) }}:
above 0 steers towards the positive side.
Cost: KL divergence from the unsteered model on a neutral text. Both in nats a token.

{% for name in facts.n_draws %}
- {{ name }}: {{ numbers[name].n_significant }} of {{ numbers[name].n }} experts significant at 5%, R2 \
{{ "%.2f" | format(facts.r2[name]) }} on held-out draws{{ "" if facts.stable[name] else "; **not stable**" }}
{% endfor %}

| layer | expert | action | effect | se | p | cost | RD |
| --- | --- | --- | --- | --- | --- | --- | --- |
{% for row in effects %}
| {{ row.layer }} | {{ row.expert }} | {{ row.action }}{{ " (random control)" if row.control }} \
| {{ "%+.4f" | format(row.effect) }} | {{ "%.4f" | format(row.effect_se) }} | {{ "%.2g" | format(row.p) }} \
| {{ "%.4f" | format(row.cost) if "cost" in row else "" }} | {{ "%+.4f" | format(map.rd[row.layer, row.expert]) }} |
{% endfor %}
{% else %}
Not measured. RD counts which experts differ between the sides; only an intervention shows which have an effect \
(`{{ attribute }}`).
{% endif %}

## Use

```sh
steermoe bias build {{ file }} -o bias.gguf{{ "" if recommended else " --activate N --deactivate M" }} -m MODEL.gguf\
{{ " --force" if not router else "" }}
steermoe run -m MODEL.gguf --bias bias.gguf -p "..."
```

More experts steer harder and cost fluency. Measure the behaviour and the model's other abilities before you rely on it.
{% if map.notes %}

## Notes

{{ map.notes | line }}
{% endif %}
"""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def render_card(expert_map: ExpertMap, base_model: str, *, license: str = "", file: str = "map.json") -> str:
    """The card as Markdown with the hub's YAML header; the same map gives the same text.

    `base_model` is the model's name on the hub, `license` defaults to the map's, `file` is the name of the map's file.

    Raises UsageError for a malformed name and without a licence.
    """
    if not _REPOSITORY.fullmatch(base_model):
        raise UsageError(f"{base_model!r} is not the name of a model on the hub; write it like org/model")
    license = license or expert_map.license
    if not license.strip():
        raise UsageError("the map has no licence; give one, like --license CC0-1.0")
    # a dependency of llama-cpp-python; imported here because that takes long
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["yaml"] = _yaml_string
    environment.filters["line"] = _one_line
    identity, effects = expert_map.identity, expert_map.effects
    rates = None
    if expert_map.a1 is not None and expert_map.a2 is not None:
        rates = (expert_map.a1 / expert_map.n1, expert_map.a2 / expert_map.n2)
    return environment.from_string(_TEMPLATE).render(
        map=expert_map,
        model=identity,
        router="" if identity.router_sha256 == UNKNOWN_ROUTER else identity.router_sha256,
        base_model=base_model,
        license=license,
        file=shlex.quote(visible(file).replace("`", "_")),  # in a fenced line for a shell
        digests=", ".join(f"`{digest}`" for digest in expert_map.pairs_sha256),
        tokens=f"{expert_map.n1:,} / {expert_map.n2:,}" if expert_map.n1 and expert_map.n2 else "",
        phase=phase_words(expert_map.phase) if expert_map.phase else "",
        confidence=expert_map.confidence,
        recommended=expert_map.recommended,
        attribute=ATTRIBUTE,
        top=expert_map.top(N_TOP),
        rates=rates,
        facts=effects.facts if effects else None,
        effects=[effects.rows()[index] for index in effects.first(N_TOP).tolist()] if effects else None,
        numbers={name: effects.numbers(action) for name, action in ACTIONS.items()} if effects else None,
        n_plus=int((expert_map.rd > 0).sum()),
        n_minus=int((expert_map.rd < 0).sum()),
    )


def _yaml_string(text: str) -> str:
    """A double-quoted YAML string."""
    plain = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in text)
    return '"' + "".join(plain) + '"'


def _one_line(text: str) -> str:
    """One line of Markdown that neither ends a table's cell nor starts HTML."""
    line = visible(" ".join(text.split()))
    return re.sub(r"([\\|`<>\[\]])", r"\\\1", line)
