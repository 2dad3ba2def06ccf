"""Files and their kinds, records of foreign data sets, `.npz` archives, control groups, visible texts: helpers below
all stages.

Imports: errors.
Public: `control_groups`, `file_kinds`, `files`, `npz`, `package`, `records`, `visible`.
"""
