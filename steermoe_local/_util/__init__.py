"""Files and their kinds, atomic writing, locks on outputs, records of foreign data sets, child processes, and more.

They are helpers below all stages.

Imports: errors.
Public: `children`, `control_groups`, `disk`, `file_kinds`, `files`, `import_path`, `json_text`, `locks`, `npz`,
`package`, `records`, `visible`, `writing`.
"""
