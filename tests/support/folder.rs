//! Folders of state, copied beside a writer.

use std::path::{Path, PathBuf};

/// Copies a folder as it lies there at one moment, which is what a crash leaves: a checkpoint that goes on beside must not give the copy an
/// old document and the journal of the new one.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    for _ in 0..100 {
        let (before, _) = (what_lies_in(from), std::fs::remove_dir_all(to));
        if try_copy(from, to).is_ok() && what_lies_in(from) == before {
            return;
        }
    }
    panic!("{} does not come to rest", from.display());
}

fn try_copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for file in std::fs::read_dir(from)? {
        let file = file?;
        if file.file_type()?.is_dir() {
            try_copy(&file.path(), &to.join(file.file_name()))?;
        } else {
            std::fs::copy(file.path(), to.join(file.file_name()))?;
        }
    }
    Ok(())
}

/// What tells the files of a folder apart from what replaces them: paths, numbers, lengths, and when they were written.
fn what_lies_in(folder: &Path) -> Vec<(PathBuf, u64, u64, i64, i64)> {
    use std::os::unix::fs::MetadataExt;
    let mut found = Vec::new();
    for file in std::fs::read_dir(folder).unwrap().flatten() {
        // What goes away meanwhile is missed at the second look.
        let Ok(meta) = file.metadata() else { continue };
        if meta.is_dir() {
            found.extend(what_lies_in(&file.path()));
        } else {
            found.push((file.path(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()));
        }
    }
    found.sort();
    found
}
