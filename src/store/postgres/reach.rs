//! How a server is reached: the hosts of the URL and their addresses, one after another, and what is said where none of them can be used.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::error::SqlState;

use super::connection::{ANSWER, Conn, Driver, Pool};
use super::error::{self, is_without_primary};
use super::hosts;
use crate::store::{StoreError, StoreErrorKind};

/// Between two times that an opening asks a server that is starting.
const BETWEEN: Duration = Duration::from_millis(100);

/// Why an address cannot be used.
enum Unused {
    /// There was no word from it.
    Silent(String),
    Refused(tokio_postgres::Error),
}

impl Unused {
    fn words(&self) -> String {
        match self {
            Self::Silent(why) => why.clone(),
            Self::Refused(error) => error::words(error),
        }
    }

    /// The fault, in these words.
    fn into_error(self, words: &str) -> StoreError {
        match self {
            Self::Silent(_) => {
                StoreError::not_applied(StoreErrorKind::Unavailable, format!("{words}; check the server and the network"))
            }
            Self::Refused(error) => error::sql_error_as(words, error),
        }
    }
}

/// All that was tried in vain, each with its name. What kind of fault it is, and what mends it, the last one says.
fn in_vain(place: &str, mut tried: Vec<(String, Unused)>) -> StoreError {
    let several = tried.len() > 1;
    let mut words = format!("{place}: ");
    for (number, (name, unused)) in tried.iter().enumerate() {
        let between = if number == 0 { "" } else { "; " };
        let name = if several { format!("{name}: ") } else { String::new() };
        let _never_fails = write!(words, "{between}{name}{}", unused.words()).is_err();
    }
    let last = tried.pop().map_or_else(|| Unused::Silent(String::new()), |(_, unused)| unused);
    last.into_error(&words)
}

impl Pool {
    /// The first connection of an opening. A server that says that it is starting is waited for.
    pub(super) async fn connect_first(&self) -> Result<Conn, StoreError> {
        let began = Instant::now();
        let mut started = false;
        loop {
            let error = match self.connect().await {
                Ok(conn) => return Ok(conn),
                Err(error) => error,
            };
            started |= self.is_starting.load(Ordering::Acquire);
            // One that is stopped and started again is away for a moment in between.
            let passes = started && error.kind() == StoreErrorKind::Unavailable;
            if !passes || began.elapsed() >= ANSWER {
                return Err(error);
            }
            tokio::time::sleep(BETWEEN).await;
        }
    }

    /// Reaches a server: of several the one that can be written to. Who only reads takes another one where there was never such a one, as for a role that may
    /// write nowhere.
    pub(super) async fn reach(&self) -> Result<(Conn, Driver), StoreError> {
        let place = &self.place;
        let made = self.try_hosts(place.config.get_target_session_attrs()).await;
        match made {
            Ok(made) => {
                self.found_primary.store(true, Ordering::Release);
                Ok(made)
            }
            Err(error) if !place.moves || !is_without_primary(&error) => Err(error),
            Err(_) if self.found_primary.load(Ordering::Acquire) => Err(StoreError::not_applied(
                StoreErrorKind::Unavailable,
                format!(
                    "{}: none of the hosts that answer can be written to now; see whether one becomes the primary",
                    place.name
                ),
            )),
            Err(_) if place.read_only => self.try_hosts(TargetSessionAttrs::Any).await,
            Err(error) => Err(error),
        }
    }

    /// Tries the hosts, and the addresses of each, until one of them can be used.
    async fn try_hosts(&self, attrs: TargetSessionAttrs) -> Result<(Conn, Driver), StoreError> {
        let place = &self.place;
        let limit = place.config.get_connect_timeout().copied().unwrap_or_default();
        let last = self.reached();
        let mut tried = Vec::new();
        for at in hosts::order(&place.config, place.targets.len(), last.map(|(at, _)| at)) {
            let Some(target) = place.targets.get(at) else { continue };
            let before = last.filter(|(last, _)| *last == at).and_then(|(_, address)| address);
            let addresses = match hosts::addresses(target, limit, before).await {
                Ok(addresses) => addresses,
                Err(why) => {
                    tried.push((target.name(None), Unused::Silent(why)));
                    continue;
                }
            };
            let several = addresses.len() > 1;
            for address in addresses {
                let config = hosts::single(&place.config, attrs, target, address);
                let unused = match tokio::time::timeout(limit, config.connect(self.tls.clone())).await {
                    Ok(Ok((client, driver))) => {
                        self.keep_reached(at, address);
                        self.is_starting.store(false, Ordering::Release);
                        return Ok((Conn::over(client, place), driver));
                    }
                    Ok(Err(error)) => Unused::Refused(error),
                    Err(_) => Unused::Silent(format!("no connection within {} s", limit.as_secs())),
                };
                tried.push((target.name(address.filter(|_| several)), unused));
            }
        }
        let says_so =
            |unused: &Unused| matches!(unused, Unused::Refused(error) if error.code() == Some(&SqlState::CANNOT_CONNECT_NOW));
        self.is_starting.store(tried.iter().any(|(_, unused)| says_so(unused)), Ordering::Release);
        Err(in_vain(&place.name, tried))
    }
}
