"""Files, records of foreign data sets and `.npz` archives: helpers that know nothing of the domain.

Imports: errors.
Public: `files`, `npz`, `package`, `records`.
"""
