"""Bounds of what strangers ask for, in requests and in saved chats alike; those of numbers are in `Sampling`."""

MAX_TEXT = 4_000_000
"""Characters of a text; the context is what really bounds a prompt."""

MAX_MESSAGES = 4096
"""Messages of a conversation."""

MAX_TOKENS = 2**31 - 1
"""Tokens of an answer."""

MAX_TOKEN_ID = 2**31 - 1
"""The largest number of a token."""

MAX_BIASES = 1024
"""Tokens with a logit bias."""
