//! File systems of other machines: SQLite's locks and its shared index do not reach over the network, and neither do the proofs of who is dead.

use std::path::Path;

use crate::store::{StoreError, StoreErrorKind, network};

/// The option that allows it all the same.
pub(super) const ALLOW: &str = "sqlite_allow_network_fs";

/// Refuses a database on a file system that may be another machine's.
pub(super) fn refuse(db: &Path) -> Result<(), StoreError> {
    match network::found(db) {
        None => Ok(()),
        Some(name) => Err(StoreError::not_applied(StoreErrorKind::Unsupported, message(db, name))),
    }
}

fn message(db: &Path, name: &str) -> String {
    format!(
        "{} lies on a file system that may be another machine's ({name}), where SQLite cannot keep it safe; use a local disk, or set \
         database_url to a server: postgres://… or libsql://…. If only this machine ever uses it: option {ALLOW}=true",
        db.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_names_the_servers() {
        let text = message(Path::new("target/state.db"), "NFS");
        for named in ["target/state.db", "NFS", "postgres://", "libsql://", ALLOW] {
            assert!(text.contains(named), "{text}");
        }
    }
}
