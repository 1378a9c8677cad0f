# A healthy child in perl that joins the trace of its task. It adds a line to the file named by LOG: the
# task's id, and the `traceparent` that it got. Then it answers. The task's arguments: how, and a file to
# wait for before. It answers `throttled` only the first time, and exits for `exit`.
use strict;
use warnings;
use JSON::PP;

$| = 1;
my $json = JSON::PP->new->utf8;
open(my $log, '>>', $ENV{LOG}) or die "LOG: $!";
$log->autoflush(1);

while (my $line = <STDIN>) {
    my $request = $json->decode($line);
    my ($id, $payload) = @$request{qw(id payload)};
    my ($how, $gate) = @{ $payload->{args} };
    my $parent = $payload->{headers}{traceparent} // "none";
    print $log "$id $parent\n";
    select(undef, undef, undef, 0.01) until !$gate or -e $gate;
    exit 3 if $how eq "exit";
    $how = "ok" if $payload->{throttles};
    my %reply = (ok => { result => $parent }, error => { message => "bad" }, throttled => { retry_after_secs => 0 });
    print $json->encode({ id => $id, status => $how, %{ $reply{$how} } }), "\n";
}
