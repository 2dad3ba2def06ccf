"""Chat templates that take all time or memory: while they are read, and while they are rendered."""

from __future__ import annotations

# Every one of them may be read: nothing of it runs before it is rendered.
DOUBLING = (
    "{%% set n = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set n.x = n.x %s n.x %%}{%% endfor %%}{{ n.x }}"
)
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

SLOW = {
    "nested ranges": FOREVER,
    "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "sorted again and again": "{% for i in range(99999) %}{% set _ = range(99999) | sort | list %}{% endfor %}",
    "grouped again and again": (
        "{% for i in range(99999) %}{% set _ = range(9999) | map('string') | groupby('zz', default=1) | list %}"
        "{% endfor %}"
    ),
    "squares": DOUBLING % ("3", "*"),
    "powers": "{% for i in range(99999) %}{% set _ = 9 ** 4000000 %}{% endfor %}",
    "lines wrapped": "{{ ('x' * 16000000) | wordwrap(1) }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 7) }}",
    "a loop that is cycled": (
        "{% set c = cycler(1) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set _ = c.next() %}"
        "{% endfor %}{% endfor %}"
    ),
}
LARGE = {
    "texts doubled": DOUBLING % ("'x'", "~"),
    "lists doubled": DOUBLING % ("[1]", "+"),
    "blocks doubled": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set b %}{{ n.x }}{{ n.x }}{% endset %}"
        "{% set n.x = b %}{% endfor %}"
    ),
    "arguments doubled": "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('x') }}",
    "join": "{{ ('x' * 16000000) | join('x' * 16000000) }}",
    "replace": "{{ ('x' * 160000) | replace('x', 'x' * 160000) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format, the filter": "{{ '%9999999999d' | format(1) }}",
    "indent": "{{ ('x\\n' * 160000) | indent(160000) }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "zfill": "{{ 'x'.zfill(10 ** 11) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(10 ** 8) }}",
    "translate": "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "JSON, indented": "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "slice": "{{ [1] | slice(10 ** 10) | list }}",
    "batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "a list of long texts": (
        "{% set l = [] %}{% for a in range(99999) %}{% set _ = l.append('x' * 16000000 ~ a) %}{% endfor %}{{ l }}"
    ),
    "a long text printed": "{% for a in range(99999) %}{{ 'x' * 16000000 }}{% endfor %}",
    "links": "{{ ('http://a.b ' * 1000000) | urlize }}",
    "a text out of proportion": "{{ 'x' * 16000000 }}{{ 'x' * 16000000 }}",
}
# What these bring Python's own compiler to depends on its version: an error, a crash, or a long time.
UNREADABLE = {
    "parentheses": "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "lists": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "signs": "{{ " + "-" * 100000 + "1 }}",
    "negations": "{{ " + "not " * 100000 + "1 }}",
    "a long sum": "{{ " + "+".join(["1"] * 200000) + " }}",
    "a long and": "{{ " + " and ".join(["x"] * 100000) + " }}",
    "powers": "{{ " + "**".join(["x"] * 100000) + " }}",
    "attributes": "{{ x" + ".a" * 100000 + " }}",
    "filters": "{{ x" + "|e" * 100000 + " }}",
    "calls": "{{ x" + "()" * 100000 + " }}",
    "conditions": "{% if x %}" * 5000 + "{% endif %}" * 5000,
    "macros in macros": "{% macro f() %}" * 1000 + "{% endmacro %}" * 1000,
    "loops in loops": "{% for x in y %}" * 30 + "{% endfor %}" * 30,
    "too many variables": "".join(f"{{% set a{i} = 1 %}}" for i in range(50000)),
    "too many blocks": "".join(f"{{% block a{i} %}}{{% endblock %}}" for i in range(20000)),
    "a long number": "{{ " + "9" * 900000 + " }}",
    "comments without an end": "{#" * 400000,
    "raw without an end": "{% raw %}" * 100000,
    "a text without an end": "{{ '" + "\\\\" * 400000,
    "a tag without a name": " " * 900000 + "{%-",
    "60 MB": "x" * 60_000_000,
    "60 MB of variables": "{{ x }}" * 8_500_000,
    "no text": "\0{% \0 %}{{ '\0' }}",
}
