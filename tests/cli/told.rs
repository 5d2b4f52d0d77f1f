//! What an operator is told where something is not as he thinks.

use std::fs;

use crate::projects::project;
use crate::run;

/// stdout holds the one value, stderr what a person should know.
#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_no_state_a_program_gets_its_value_and_a_person_the_hint() {
    let dir = project("file").await;
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    for arguments in ["state runs", "state locks", "state cleanup --days 30", "state cleanup --days 30 --dry-run"] {
        let (code, out, err) = run(dir.path(), &format!("{arguments} -o json"));
        assert!(code == 0 && serde_json::from_str::<serde_json::Value>(&out).is_ok(), "{arguments}: {out}{err}");
        assert!(err.starts_with("note: There is no state yet in /"), "{arguments}: {err}");
        assert!(err.contains("run_state.json is there: state_backend: file?"), "{arguments}: {err}");
        let (_, out, err) = run(dir.path(), arguments);
        assert!(out.contains("state_backend: file?") && err.is_empty(), "{arguments}: told once: {out}{err}");
    }
}
