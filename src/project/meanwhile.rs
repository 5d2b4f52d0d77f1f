//! What happened between reading the settings and opening what they name.

use super::{ProjectError, ProjectErrorKind, Settings, Source};

/// What a settings file without the key names.
const DEFAULT: &str = "file";

impl Settings {
    /// Refuses a place that was left since these settings were read: what is written there nobody would read. To be asked once the place is open for writing: a
    /// move switches the settings before it lets anybody in again, so that whoever came in behind it sees the switch.
    pub(crate) fn refuse_left(&self) -> Result<(), ProjectError> {
        // What a variable of the environment names no move changes.
        if let Source::Environment(_) = self.backend.source {
            return Ok(());
        }
        let now = Self::load(&self.project, &|_| None)?;
        let named = |settings: &Self| settings.backend_in_file.clone().unwrap_or_else(|| DEFAULT.to_owned());
        let (then, by_now) = (named(self), named(&now));
        if then == by_now {
            return Ok(());
        }
        Err(ProjectError::new(
            ProjectErrorKind::Conflict,
            format!(
                "{}: it named the {then} backend when it was read, and names {by_now} by now: the state was moved meanwhile; nothing was written. Start again, with \
                 settings that are read anew",
                now.file_or_default().display()
            ),
        ))
    }
}
