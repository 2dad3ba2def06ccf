"""Files, records of foreign data sets, `.npz` archives, control groups: helpers that know nothing of the domain.

Imports: errors.
Public: `control_groups`, `files`, `npz`, `package`, `records`.
"""
