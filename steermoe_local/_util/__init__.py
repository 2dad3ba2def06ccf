"""Files and their kinds, records of foreign data sets, `.npz` archives: helpers below all stages.

Imports: errors.
Public: `file_kinds`, `files`, `npz`, `package`, `records`.
"""
