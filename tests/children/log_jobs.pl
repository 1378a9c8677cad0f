# A healthy child in perl: appends its pid and the task's id to the file named by LOG, and answers.
# With MEET=n it answers its first job only when n children have one each.
use strict;
use warnings;
$| = 1;
open(my $log, '>>', $ENV{LOG}) or die "LOG: $!";
$log->autoflush(1);

sub pids {
    open(my $lines, '<', $ENV{LOG}) or die "LOG: $!";
    my %seen = map { (split)[0] => 1 } <$lines>;
    return scalar keys %seen;
}

my $meet = $ENV{MEET} // 0;
while (my $line = <STDIN>) {
    my ($id) = $line =~ /"id":"([^"]*)"/;
    print $log "$$ $id\n";
    select(undef, undef, undef, 0.01) while $meet and pids() < $meet;
    $meet = 0;
    print qq({"id":"$id","status":"ok","result":$$}\n);
}
