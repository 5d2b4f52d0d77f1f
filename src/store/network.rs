//! Which file systems may be another machine's.

use std::path::Path;

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

/// The name of the file system that a path lies on, or would, if it may be another machine's.
#[cfg(target_os = "linux")]
pub(super) fn found(path: &Path) -> Option<&'static str> {
    let there = path.ancestors().find(|folder| !folder.as_os_str().is_empty() && folder.exists()).unwrap_or(Path::new("."));
    let found = rustix::fs::statfs(there).ok()?;
    // The kernel's type is as wide as a word, the numbers have 32 bits.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "magic numbers of file systems have 32 bits")]
    let magic = found.f_type as u32;
    name(magic)
}

#[cfg(not(target_os = "linux"))]
pub(super) fn found(_: &Path) -> Option<&'static str> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_known_and_local_ones_are_none() {
        for magic in [0x6969, 0xFF53_4D42, 0xFE53_4D42, 0x6573_5546, 0x0102_1997] {
            assert!(name(magic).is_some(), "{magic:#x}");
        }
        // ext4, XFS, Btrfs, ZFS, tmpfs, overlayfs.
        for magic in [0xEF53, 0x5846_5342, 0x9123_683E, 0x2FC1_2FC1, 0x0102_1994, 0x794C_7630] {
            assert_eq!(name(magic), None, "{magic:#x}");
        }
    }
}
