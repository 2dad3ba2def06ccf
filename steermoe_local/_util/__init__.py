"""Files and their kinds, atomic writing, locks on outputs, records of foreign data sets, child processes, and more.

They are helpers below all stages: also for JSON, TOML and archives from strangers, and for texts on a terminal.

Imports: errors.
Public: `children`, `compressed`, `control_groups`, `disk`, `file_kinds`, `files`, `import_path`, `json_text`, `locks`,
`markdown`, `npz`, `package`, `records`, `regular_files`, `toml_text`, `visible`, `writing`, `zip_files`.
"""
