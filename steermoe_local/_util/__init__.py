"""Files and their kinds, atomic writing, locks on outputs, records of foreign data sets, and more.

They are helpers below all stages.

Imports: errors.
Public: `control_groups`, `disk`, `file_kinds`, `files`, `locks`, `npz`, `package`, `records`, `writing`.
"""
