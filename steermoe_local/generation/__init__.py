"""Generates answers under steering: engine, answers to prompts, chat, chat files, what an answer's routing says.

Imports: everything up to llama; not detection.
Public: `Engine`, `Request`, `Reply`, `answers`, `Chat`.
"""
