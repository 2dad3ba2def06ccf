"""Files and their kinds, records of foreign data sets, `.npz` archives, control groups, child processes.

Helpers below all stages.

Imports: errors.
Public: `children`, `control_groups`, `file_kinds`, `files`, `import_path`, `npz`, `package`, `records`.
"""
