//! What a build says of a database that it was made without. Run with default features by `.ci/check`; with all features there is nothing missing,
//! and the same calls must not blame the build.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use seeknal_state::{BackendOptions, StoreErrorKind, create_state_backend};

#[test]
fn a_database_url_without_its_feature_says_which_one_is_missing() {
    for (url, feature, is_on) in [
        ("postgres://u:s3cret@db.example.org/d", "postgres", cfg!(feature = "postgres")),
        ("libsql://s3cret@db.example.org", "libsql", cfg!(feature = "libsql")),
    ] {
        let made = create_state_backend("database", &BackendOptions::new().database_url(url));
        let Err(error) = made else {
            assert!(is_on, "{url}: this build cannot open it");
            continue;
        };
        assert!(!is_on, "{error}");
        let message = error.to_string();
        assert!(message.contains(&format!("feature `{feature}`")), "{message}");
        assert!(!message.contains("s3cret"), "{message}");
    }
    for (name, is_on) in [("file", cfg!(feature = "file")), ("database", cfg!(feature = "sqlite"))] {
        let made = create_state_backend(name, &BackendOptions::new());
        assert_eq!(made.is_ok(), is_on, "{name}");
        if let Err(error) = made {
            assert_eq!(error.kind(), StoreErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains("feature"), "{error}");
        }
    }
}
