//! A backend of one's own, by its name: in settings, through `project::open`, and as what a project can be told to use.
#![cfg(feature = "project")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex};

use seeknal_state::project::{self, ProjectErrorKind, Settings};
use seeknal_state::{
    BackendOptions, MemoryBackend, NewRun, NodeUpdate, StateBackend, StateBackendFactory, StoreErrorKind, create_state_backend,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_registered_backend_is_opened_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("seeknal_project.yml"),
        "state_backend: custom\nseeknal_state:\n  target_path: out\n  options: {region: eu, size: 3}\n",
    )
    .unwrap();
    let unknown = Settings::load(dir.path(), &|_| None).unwrap_err();
    assert_eq!(unknown.kind(), ProjectErrorKind::Input);
    assert!(unknown.to_string().contains("\"custom\"") && unknown.to_string().contains("file"), "{unknown}");

    let seen: Arc<Mutex<Vec<BTreeMap<&str, String>>>> = Arc::default();
    let backend: Arc<dyn StateBackend> = Arc::new(MemoryBackend::new());
    let (noted, kept) = (Arc::clone(&seen), Arc::clone(&backend));
    StateBackendFactory::register("custom", move |options: &BackendOptions| {
        let of = |name: &'static str| (name, options.get(name).unwrap_or_default().to_owned());
        let base = ("base", options.base().display().to_string());
        noted.lock().unwrap().push([of("region"), of("size"), of("option"), base].into());
        Ok(Arc::clone(&kept))
    })
    .unwrap();
    assert!(StateBackendFactory::names().contains(&"custom".to_owned()));

    let state = project::open(dir.path()).await.unwrap();
    state.create_run("run_1", NewRun::running()).await.unwrap();
    state.set_node_state("run_1", "n", NodeUpdate::success().row_count(7)).await.unwrap();
    assert!(backend.load_run(state.get_run("run_1").await.unwrap().unwrap().id()).await.unwrap().is_some());
    state.close().await.unwrap();
    {
        let seen = seen.lock().unwrap();
        assert_eq!((&*seen[0]["region"], &*seen[0]["size"]), ("eu", "3"));
        assert!(seen[0]["base"].ends_with("/out"), "{seen:?}");
    }
    create_state_backend("custom", &BackendOptions::new().set("option", "value")).unwrap();
    assert_eq!(seen.lock().unwrap().last().unwrap()["option"], "value");

    // Built-in names and names that are none are refused.
    for name in ["file", "database", "memory", "", "a b", "a/b"] {
        assert!(StateBackendFactory::register(name, |_| Ok(Arc::new(MemoryBackend::new()) as _)).is_err(), "{name:?}");
    }
}

/// What is swallowed sends the work to another schema, or to nowhere.
#[test]
fn what_no_built_in_backend_takes_is_refused_by_all_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let none = BackendOptions::new().base_path(dir.path());
    let wrong = [
        ("database_flush_shard", "8", "database_flush_shards"),
        ("sqlite_allow_network_fs", "True", "true or false"),
        ("database_poll_ms", "9", "10 to 60000"),
        ("database_token", "t0ken\0", "the token"),
        ("region", "t0ken", "known are: database_ca_file"),
    ];
    for name in StateBackendFactory::names().iter().filter(|name| ["file", "database", "memory"].contains(&name.as_str())) {
        for (option, value, hint) in wrong {
            let options = none.clone().set(option, value);
            let error = create_state_backend(name, &options).unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Input, "{name}: {error}");
            let told = error.to_string();
            assert!(told.contains(option) && told.contains(hint) && !told.contains("t0ken"), "{name}: {told}");
            create_state_backend(name, &options.unset(option)).unwrap();
        }
        // Those of another backend are kept, as in a project.
        let known = [("database_schema", "eu"), ("database_flush_shards", "64"), ("sqlite_allow_network_fs", "false")];
        let options = known.iter().fold(none.clone(), |options, (name, value)| options.set(*name, *value));
        create_state_backend(name, &options).unwrap();
    }
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
}
