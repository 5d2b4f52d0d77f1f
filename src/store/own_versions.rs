//! Which versions of a run this process committed itself: how a backend that others write to tells its own commits from theirs.

use crate::model::Version;

/// Stretches remembered of one run; chains in flight are short, and only they ask.
const STRETCHES: usize = 16;

/// The versions of one run that this process committed, as stretches without a gap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct OwnVersions {
    /// Mostly there is one: it costs no allocation.
    newest: Option<(u64, u64)>,
    /// Those before it, oldest first.
    older: Vec<(u64, u64)>,
}

impl OwnVersions {
    /// Adds the newest version.
    pub(crate) fn push(&mut self, version: Version) {
        match &mut self.newest {
            Some((_, last)) if last.checked_add(1) == Some(version.0) => *last = version.0,
            newest => {
                if let Some(before) = newest.replace((version.0, version.0)) {
                    if self.older.len() + 1 >= STRETCHES {
                        self.older.remove(0);
                    }
                    self.older.push(before);
                }
            }
        }
    }

    fn stretches(&self) -> impl Iterator<Item = &(u64, u64)> {
        self.older.iter().chain(&self.newest)
    }

    /// Whether every version after `base` up to `version` is one of them.
    pub(crate) fn covers(&self, base: Version, version: Version) -> bool {
        base == version
            || self.newest.is_some_and(|(first, last)| base.0 < version.0 && first <= base.next().0 && last == version.0)
    }

    /// How many of them are after `base`.
    pub(crate) fn count_after(&self, base: Version) -> u64 {
        self.stretches().map(|(first, last)| (last.saturating_add(1)).saturating_sub((*first).max(base.next().0))).sum()
    }

    /// Whether this version is one of them.
    pub(crate) fn contains(&self, version: Version) -> bool {
        self.stretches().any(|(first, last)| (*first..=*last).contains(&version.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_tell_own_from_foreign() {
        let mut own = OwnVersions::default();
        assert!(own.covers(Version(3), Version(3)));
        assert!(!own.covers(Version(3), Version(4)));
        for version in [4, 5, 7] {
            own.push(Version(version));
        }
        assert!(!own.covers(Version(3), Version(5)), "version 7 came after");
        assert!(own.covers(Version(6), Version(7)));
        assert!(!own.covers(Version(5), Version(7)), "version 6 is somebody else's");
        assert!(own.contains(Version(5)) && !own.contains(Version(6)));
        assert_eq!((own.count_after(Version(3)), own.count_after(Version(4)), own.count_after(Version(7))), (3, 2, 0));
    }
}
