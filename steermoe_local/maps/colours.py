"""The colours of what is promoted and suppressed, of RD above and below 0, in pictures, on the page and on terminals.

One scheme: red is positive and promoted, blue is negative and suppressed. They differ under every common colour
blindness, on light and on dark ground; where they must differ in grey, too, promoted is a filled triangle that points
up or a plain bar, suppressed a hollow one that points down or a hatched bar. The page has the same colours as variables
in server/page/tokens.css.
"""

from __future__ import annotations

POSITIVE, NEGATIVE = "#b2182b", "#2166ac"
"""In pictures: RD above 0 and promoted experts; RD below 0 and suppressed ones."""
PAGE_LIGHT, PAGE_DARK = ("#cf3543", "#2b70d2"), ("#d24a5d", "#3a80d8")
"""The same (positive, negative) on the page, on light and on dark ground: marks in the text's colour lie on them."""
SCALE = "RdBu_r"
"""Matplotlib's name of the scale from `NEGATIVE` over white to `POSITIVE`."""
NOTHING = "#d9d9d9"
"""What has no value: layers without a router, experts that were not tried."""
NEUTRAL = "#777777"
"""Of neither side: unsteered, random draws, chance."""
RANDOM = "#e08214"
"""Random controls beside both sides."""

MARKERS = {"promoted": "^", "suppressed": "v"}
HATCH = "////"
"""Of bars below 0."""

TERMINAL = {"promoted": "red", "suppressed": "blue"}
"""Their names on terminals, whose own palette says which red and which blue."""

LEAST_RD = 0.02
"""Least end of an axis or a scale of RD: below it, differences are noise of some hundred tokens."""
LEAST_EFFECT = 0.02
"""The same of effects of experts, in nats a token."""
LEAST_POINTS = 10.0
"""The same of differences of rates, in points: two items of twenty."""
LEAST_PERCENT = 5.0
"""The same of a rise of the perplexity, in percent: the usual budget."""
LEAST_KL = 0.01
"""The same of a KL, in nats a token."""
