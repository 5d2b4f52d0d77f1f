//! File systems of other machines: SQLite's locks and its shared index do not reach over the network, and neither do the proofs of who is dead.

use std::path::Path;

use crate::store::StoreError;
#[cfg(target_os = "linux")]
use crate::store::StoreErrorKind;

/// The option that allows it all the same.
pub(super) const ALLOW: &str = "sqlite_allow_network_fs";

/// By the numbers that the kernel gives them.
#[cfg(target_os = "linux")]
const NETWORKS: &[(u32, &str)] = &[
    (0x0000_6969, "NFS"),
    (0x0000_517B, "SMB"),
    (0xFE53_4D42, "SMB2"),
    (0xFF53_4D42, "CIFS"),
    (0x0000_564C, "NCP"),
    (0x5346_414F, "AFS"),
    (0x6B41_4653, "AFS"),
    (0x00C3_6400, "Ceph"),
    (0x0BD0_0BD0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
    (0x7461_636F, "OCFS2"),
    (0x0116_1970, "GFS2"),
    (0x7375_7245, "Coda"),
    (0x6573_5546, "FUSE: sshfs, virtiofs and the like"),
    (0x0102_1997, "9p"),
    (0x786F_4256, "VirtualBox's shared folders"),
];

#[cfg(target_os = "linux")]
fn name(magic: u32) -> Option<&'static str> {
    NETWORKS.iter().find(|(known, _)| *known == magic).map(|(_, name)| *name)
}

/// Refuses a database on a file system that may be another machine's.
#[cfg(target_os = "linux")]
pub(super) fn refuse(db: &Path) -> Result<(), StoreError> {
    let mut folder = db.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    while !folder.exists() {
        match folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => folder = parent,
            _ => {
                folder = Path::new(".");
                break;
            }
        }
    }
    let target = if db.exists() { db } else { folder };
    let Ok(found) = rustix::fs::statfs(target) else { return Ok(()) };
    // The kernel's type is as wide as a word, the numbers have 32 bits.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "magic numbers of file systems have 32 bits")]
    let magic = found.f_type as u32;
    match name(magic) {
        None => Ok(()),
        Some(name) => Err(StoreError::not_applied(StoreErrorKind::Unsupported, message(db, name))),
    }
}

#[cfg(target_os = "linux")]
fn message(db: &Path, name: &str) -> String {
    format!(
        "{} lies on a file system that may be another machine's ({name}), where SQLite cannot keep it safe; use a local disk, or set \
         database_url to a server: postgres://… or libsql://…. If only this machine ever uses it: option {ALLOW}=true",
        db.display()
    )
}

#[cfg(not(target_os = "linux"))]
pub(super) fn refuse(_: &Path) -> Result<(), StoreError> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_known_and_the_servers_named() {
        for magic in [0x6969, 0xFF53_4D42, 0xFE53_4D42, 0x6573_5546, 0x0102_1997] {
            assert!(name(magic).is_some(), "{magic:#x}");
        }
        // ext4, XFS, Btrfs, ZFS, tmpfs, overlayfs.
        for magic in [0xEF53, 0x5846_5342, 0x9123_683E, 0x2FC1_2FC1, 0x0102_1994, 0x794C_7630] {
            assert_eq!(name(magic), None, "{magic:#x}");
        }
        let text = message(Path::new("target/state.db"), "NFS");
        for named in ["target/state.db", "NFS", "postgres://", "libsql://", ALLOW] {
            assert!(text.contains(named), "{text}");
        }
    }
}
