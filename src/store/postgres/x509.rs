//! The key of a certificate of X.509 version 1 or 2, which rustls reads no more. Where a certificate is taken unseen, its age does not matter: who holds it must
//! still prove it.

use rustls::DigitallySignedStruct;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::{CertificateError, Error, PeerMisbehaved};

const INTEGER: u8 = 0x02;
const BITS: u8 = 0x03;
const SEQUENCE: u8 = 0x30;
/// A certificate's version, where it is not the first.
const VERSION: u8 = 0xA0;
/// What stands there for version 3.
const THREE: &[u8] = &[INTEGER, 1, 2];

/// One element of DER.
struct Element<'a> {
    tag: u8,
    /// With its head.
    whole: &'a [u8],
    content: &'a [u8],
    /// What stands behind it.
    rest: &'a [u8],
}

fn element(der: &[u8]) -> Option<Element<'_>> {
    let (&tag, after) = der.split_first()?;
    let (&first, mut after) = after.split_first()?;
    let mut length = usize::from(first);
    if first & 0x80 != 0 {
        let (digits, more) = after.split_at_checked(usize::from(first & 0x7F))?;
        if !(1..=4).contains(&digits.len()) {
            return None;
        }
        length = digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit));
        after = more;
    }
    let (content, rest) = after.split_at_checked(length)?;
    let whole = der.get(..der.len().saturating_sub(rest.len()))?;
    Some(Element { tag, whole, content, rest })
}

/// An element of this kind.
fn expect(der: &[u8], tag: u8) -> Option<Element<'_>> {
    element(der).filter(|element| element.tag == tag)
}

/// The public key of a certificate, with what kind of key it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OldKey<'a> {
    info: &'a [u8],
    algorithm: &'a [u8],
    bits: &'a [u8],
}

impl<'a> OldKey<'a> {
    /// None: it is a certificate of version 3, or none at all.
    pub(super) fn of(certificate: &'a [u8]) -> Option<Self> {
        let signed = expect(expect(certificate, SEQUENCE)?.content, SEQUENCE)?;
        let mut rest = signed.content;
        if let Some(version) = expect(rest, VERSION) {
            if version.content == THREE {
                return None;
            }
            rest = version.rest;
        }
        // The number, how it is signed, by whom, from when to when, and for whom.
        for tag in [INTEGER, SEQUENCE, SEQUENCE, SEQUENCE, SEQUENCE] {
            rest = expect(rest, tag)?.rest;
        }
        let info = expect(rest, SEQUENCE)?;
        let algorithm = expect(info.content, SEQUENCE)?;
        // The first byte says how many bits of the last one do not count: none.
        let (&0, bits) = expect(algorithm.rest, BITS)?.content.split_first()? else { return None };
        Some(Self { info: info.whole, algorithm: algorithm.content, bits })
    }

    pub(super) fn verify_tls13(
        &self,
        message: &[u8],
        signed: &DigitallySignedStruct,
        known: &WebPkiSupportedAlgorithms,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature_with_raw_key(message, &SubjectPublicKeyInfoDer::from(self.info), signed, known)
    }

    pub(super) fn verify_tls12(
        &self,
        message: &[u8],
        signed: &DigitallySignedStruct,
        known: &WebPkiSupportedAlgorithms,
    ) -> Result<HandshakeSignatureValid, Error> {
        let of_scheme = known.mapping.iter().find(|(scheme, _)| *scheme == signed.scheme);
        let (_, algorithms) = of_scheme.ok_or(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme)?;
        let fits = algorithms.iter().find(|algorithm| algorithm.public_key_alg_id().as_ref() == self.algorithm);
        let verified = fits.is_some_and(|algorithm| algorithm.verify_signature(self.bits, message, signed.signature()).is_ok());
        if verified { Ok(HandshakeSignatureValid::assertion()) } else { Err(CertificateError::BadSignature.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tag: u8, content: &[u8]) -> Vec<u8> {
        let mut der = vec![tag, 0x82];
        der.extend(u16::try_from(content.len()).unwrap().to_be_bytes());
        der.extend(content);
        der
    }

    fn certificate(version: &[u8]) -> Vec<u8> {
        let mut fields = if version.is_empty() { Vec::new() } else { of(VERSION, version) };
        fields.extend(of(INTEGER, &[7]));
        for _ in 0..4 {
            fields.extend(of(SEQUENCE, &[0; 200]));
        }
        fields.extend(of(SEQUENCE, &[of(SEQUENCE, b"kind"), of(BITS, b"\0key")].concat()));
        of(SEQUENCE, &[of(SEQUENCE, &fields), of(SEQUENCE, b"kind"), of(BITS, b"\0signature")].concat())
    }

    #[test]
    fn keys_of_old_certificates_are_found_and_nothing_else() {
        for version in [&[][..], &[INTEGER, 1, 0], &[INTEGER, 1, 1]] {
            let certificate = certificate(version);
            let key = OldKey::of(&certificate).unwrap();
            assert_eq!((key.algorithm, key.bits), (&b"kind"[..], &b"key"[..]));
            for length in 0..certificate.len() {
                assert_eq!(OldKey::of(&certificate[..length]), None);
            }
        }
        assert_eq!(OldKey::of(&certificate(THREE)), None);
        assert_eq!(OldKey::of(&[SEQUENCE, 0x84, 0xFF, 0xFF, 0xFF, 0xFF, 0]), None);
        assert_eq!(OldKey::of(&[SEQUENCE, 0x80]), None);
    }
}
