//! Finds the examples as cargo lays them out, and runs them as a user would.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// The built example of that name; it is built if it is not there.
pub(crate) fn example(name: &str) -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let test = std::env::current_exe().unwrap();
    // target/debug/deps/kill9-… beside target/debug/examples/….
    let profile = test.parent().and_then(Path::parent).unwrap();
    let path = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    let _one_at_a_time = BUILDING.lock().unwrap();
    if !path.exists() {
        let mut features = Vec::new();
        for (feature, is_on) in [
            ("file", cfg!(feature = "file")),
            ("sqlite", cfg!(feature = "sqlite")),
            ("postgres", cfg!(feature = "postgres")),
            ("libsql", cfg!(feature = "libsql")),
            ("conformance", cfg!(feature = "conformance")),
            ("cli", cfg!(feature = "cli")),
        ] {
            if is_on {
                features.push(feature);
            }
        }
        let mut build = Command::new(env!("CARGO"));
        build.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--quiet", "--no-default-features", "--example", name]);
        build.arg("--target-dir").arg(profile.parent().unwrap()).arg("--features").arg(features.join(","));
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "example {name} does not build");
    }
    path
}
